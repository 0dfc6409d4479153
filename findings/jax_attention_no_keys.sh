#!/usr/bin/env bash
# What jax.nn.dot_product_attention gives a row that sees no key depends on the argument that hides the keys.
#
# Versions:  jax 0.10.2, jaxlib 0.10.2, numpy 2.4.6; CPU.
# Guess:     mask, key_value_seq_lengths and a bias of -inf are three ways to hide keys, and agree; a sequence whose
#            length is 0 gives 0, or NaN, but nothing of what lies in its padding.
# Behaviour: with mask or key_value_seq_lengths such a row is the mean of all values, those that are hidden included;
#            with a bias it is NaN, and a row beyond query_seq_lengths is 0.
# Seen:      mask: the mean of all values; key_value_seq_lengths=0: the mean of all values; bias=-inf: NaN;
#            query_seq_lengths=0: 0; values behind a length of 0 reach the output: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
cat >"$folder/rows.py" <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 4))  # batch, length, heads, head_dim
none = jnp.zeros(1, jnp.int32)
mean = np.broadcast_to(value.mean(1, keepdims=True), value.shape)


def kind(value=value, **hiding) -> str:
    out = np.asarray(jax.nn.dot_product_attention(query, key, value, **hiding))
    if np.isnan(out).all():
        return "NaN"
    if not out.any():
        return "0"
    return "the mean of all values" if np.allclose(out, mean, atol=1e-6) else "something else"


seen = {
    "mask": kind(mask=jnp.zeros((1, 1, 5, 5), bool)),
    "key_value_seq_lengths=0": kind(key_value_seq_lengths=none),
    "bias=-inf": kind(bias=jnp.full((1, 1, 5, 5), -jnp.inf)),
    "query_seq_lengths=0": kind(query_seq_lengths=none),
}
reach = kind(value=value + 1, key_value_seq_lengths=none) != kind(key_value_seq_lengths=none)
print("; ".join(f"{name}: {how}" for name, how in seen.items()), end="; ")
print(f"values behind a length of 0 reach the output: {reach}")
assert list(seen.values()) == ["the mean of all values", "the mean of all values", "NaN", "0"] and reach, (
    "changed: look at it again"
)
PYTHON
"$folder/venv/bin/python" "$folder/rows.py"
