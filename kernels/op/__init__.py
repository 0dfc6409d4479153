"""The registered ops."""
