"""The attention kernels: the registered ops (:mod:`sigswap.kernels.op.dense`) and what implements them.

:mod:`sigswap.kernels.reference` defines the result on every device, in plain PyTorch.
"""

MASKED_SCORE = -5000.0
"""An additive mask or a score at or below this value means "masked".

Models mask with -inf, with ``finfo.min`` of some dtype, and with -1e4. Under softmax the difference does
not show. Sigmoid attention counts the visible keys of a row, so it must tell masked from merely unlikely.
"""
