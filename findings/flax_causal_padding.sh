#!/usr/bin/env bash
# Flax's attention takes is_causal with a padding mask without dropout, and fails on the same two with dropout.
#
# Versions:  flax 0.12.8 (nnx), jax 0.10.2, numpy 2.4.6; CPU, float32.
# Guess:     dropout changes which probabilities are kept, not which masks are taken: mask "should be broadcastable to
#            [batch..., num_heads, q_length, kv_length]", so the padding mask [batch, 1, 1, kv_length] is right in each
#            mode, as it is without is_causal.
# Behaviour: without dropout the call goes to jax.nn.dot_product_attention, which is right. With dropout_rate above 0,
#            be it deterministic (evaluation) or not, and with sow_weights=True, Flax works out the probabilities
#            itself, and there brings the causal triangle to the shape of the mask: ValueError. So a model that is built
#            without dropout breaks when dropout, or a look at its weights, is switched on. The mask expanded to [batch,
#            1, q_length, kv_length] is right in all.
# Seen:      [2, 1, 1, 4]: dropout 0 right, dropout 0.1 deterministic ValueError, sow_weights ValueError
#            [2, 1, 4, 4]: dropout 0 right, dropout 0.1 deterministic right, sow_weights right
#            [2, 1, 1, 4] without is_causal: dropout 0 right, dropout 0.1 deterministic right, sow_weights right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip numpy==2.4.6 jax==0.10.2 flax==0.12.8
cat >"$folder/padding.py" <<'PYTHON'
import jax.numpy as jnp
import numpy as np
from flax import nnx

inputs = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 8), dtype=np.float32))
padding = jnp.array([[True, True, True, True], [True, True, False, False]])[:, None, None, :]
expanded = jnp.broadcast_to(padding, (2, 1, 4, 4))
causal = jnp.tri(4, dtype=bool)


def attention(dropout):
    return nnx.MultiHeadAttention(
        num_heads=2, in_features=8, qkv_features=8, decode=False, dropout_rate=dropout, rngs=nnx.Rngs(0)
    )


def verdicts(mask, is_causal):
    right = attention(0.0)(inputs, mask=expanded & causal if is_causal else expanded)
    found = []
    for dropout, sow in ((0.0, False), (0.1, False), (0.0, True)):
        try:
            out = attention(dropout)(inputs, mask=mask, is_causal=is_causal, deterministic=True, sow_weights=sow)
        except ValueError:
            found.append("ValueError")
            continue
        found.append("right" if jnp.allclose(out, right, atol=1e-5) else "wrong")
    return tuple(found)


seen = {
    "[2, 1, 1, 4]": verdicts(padding, True),
    "[2, 1, 4, 4]": verdicts(expanded, True),
    "[2, 1, 1, 4] without is_causal": verdicts(padding, False),
}
for name, each in seen.items():
    print("{}: dropout 0 {}, dropout 0.1 deterministic {}, sow_weights {}".format(name, *each))
fails = ("right", "ValueError", "ValueError")
assert list(seen.values()) == [fails, ("right",) * 3, ("right",) * 3], "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/padding.py"
