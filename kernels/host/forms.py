"""The forms of the sigmoid, which :mod:`sigswap.kernels.triton.common` describes, and where each is good enough."""

from __future__ import annotations

FAST_BIAS = -8.5
"""The fast form is used where the row bias is at least this (with the visible-keys bias: up to 4,900 keys).

Measured on an H100 in bfloat16 with n keys, error of the fast over that of the accurate form, in the output and each
gradient: 1.00 at n = 1024, 1.01 at 2048, 1.05 at 4096, 1.16 at 8192, 1.39 at 16,384, 2.2 at 131,072."""

CUBIC_TAIL_BIAS = -8.0
"""The cubic tail form is used where the row bias is at most this (3,000 keys): above, many warps have a t that is too
large for it. Measured on an H100: with 1,024 keys a forward takes up to 1.2 times as long with it, with 4,096 0.87."""

ACCURATE, TAIL, FAST, AUTO, CUBIC_TAIL = 0, 1, 2, 3, 4
"""Values of the kernels' FORM and SLOW. FORM is FAST; or ACCURATE, which stands for SLOW; or AUTO: FAST in blocks whose
rows all have a bias of at least FAST_BIAS, else SLOW."""

NO_TANH, EXACT_TANH, SHORT_TANH = 0, 1, 2
"""Values of the kernels' SOFTCAP: none; tanh to 3e-7 of itself; tanh to 7e-6 of itself, which half precision does not
show, and without a special instruction where the scores of a whole warp's part of a tile are below the cap."""
