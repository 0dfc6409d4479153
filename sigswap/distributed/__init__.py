"""Converted models on many processes, by torch.distributed."""
