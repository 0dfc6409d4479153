"""What dropout draws: the definition, which the kernels and plain PyTorch share.

Score (b, h, i, j) is in row R = (b H + h) M + i; packed sequences count their rows as if they were padded to the
longest. A row has two words of 32 bits, the first two that Philox4x32-10 (Salmon et al., SC 2011) makes of the seed and
R; each of its scores mixes its column into them, modulo 2^32::

    x = ((j A) ^ w_0) B;  x = (x ^ (x >> 15) ^ w_1) C

and is dropped where x < 2^32 dropout_p. So a score takes two multiplications, where Philox takes forty, and both
orientations of a tile find the same numbers. A, B and C are odd, so that a row never draws a number twice.
"""

from __future__ import annotations

COLUMN, FIRST, SECOND = 0x9E3779B1, 0x7FEB352D, 0x846CA68B
"""A, B and C."""
SHIFT = 15
RANGE, LAST = 2.0**32, 2.0**32 - 2**8
"""Of the numbers, and the largest number in float32 below it: what a probability of 1 compares with."""
