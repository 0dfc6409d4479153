"""What "masked" means. A leaf module that passes and kernels share: it imports nothing."""

MASKED_SCORE = -5000.0
"""An additive mask or a score at or below this value means "masked": the probability is exactly 0.

Models mask with -inf, with ``finfo.min`` of some dtype, and with -1e4. Under softmax the difference does
not show. Sigmoid attention counts the visible keys of a row, so it must tell masked from merely unlikely.
"""
