"""Attention over a sequence of which each process has a part."""
