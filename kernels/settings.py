"""What a user may set about the kernels, process-wide."""

from __future__ import annotations

import os
from typing import Literal

sigmoid_form: Literal["auto", "fast", "accurate"] = "auto"
"""The sigmoid of the Triton kernels.

"auto": the fast form where it is accurate enough for the row bias at hand
(:mod:`sigswap.kernels.triton.common`), which does not show in bfloat16's rounding; else an accurate one."""

check_lengths: bool = os.environ.get("SIGSWAP_CHECK_LENGTHS", "0") not in ("", "0")
"""Whether calls for packed sequences check the values in cu_seqlens on a GPU, too, before they run, and those for keys
in pages the values in block_table and cache_seqlens.

An ``ArgumentError`` says which is wrong. Unchecked, wrong ones are brought into range, and results are wrong. Each call
then waits for the GPU, also in compiled code: there the op checks when it runs, without a guard or a graph break. What
a CUDA graph captures is not checked. For debugging; the environment variable SIGSWAP_CHECK_LENGTHS=1 sets it, too."""
