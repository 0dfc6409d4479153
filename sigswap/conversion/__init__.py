"""Conversion of a model in place: look at it, plan, install."""
