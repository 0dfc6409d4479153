"""The suite distributed of ``sigswap bench``."""
