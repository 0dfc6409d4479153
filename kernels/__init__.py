"""The attention kernels: the registered ops (:mod:`sigswap.kernels.op.dense`) and what implements them.

:mod:`sigswap.kernels.reference` defines the result on every device, in plain PyTorch.
"""

from sigswap.masked import MASKED_SCORE as MASKED_SCORE
