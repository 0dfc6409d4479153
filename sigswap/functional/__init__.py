"""Sigmoid attention as functions."""
