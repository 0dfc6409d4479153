"""The swap and the kernels in compiled graphs."""
