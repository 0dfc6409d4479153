"""What a user may set about the kernels, process-wide."""

from __future__ import annotations

from typing import Literal

sigmoid_form: Literal["auto", "fast", "accurate"] = "auto"
"""The sigmoid of the Triton kernels.

"auto": the fast form where it is accurate enough for the row bias at hand
(:mod:`sigswap.kernels.triton.common`), which does not show in bfloat16's rounding; else an accurate one."""
