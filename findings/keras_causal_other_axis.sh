#!/usr/bin/env bash
# Keras's MultiHeadAttention along an axis that is not the first: the causal mask is lost, and the future is seen.
#
# Versions:  keras 3.15.1 with its numpy and its jax backend, jax 0.10.2, numpy 2.4.6; CPU, float32.
# Guess:     attention_axes says "axes over which the attention is applied", and use_causal_mask=True hides the future
#            along them: of [batch, series, time, channels] along time, with attention_axes=2.
# Behaviour: the mask is made from the length of axis 1, whatever attention_axes says. With one series that mask is a
#            single True: it broadcasts, hides nothing, and nothing is said. sliding_window is lost in the same way.
#            With as many series as times it is right by luck, with another number the call raises. The same triangle as
#            attention_mask, or the input as [batch, time, channels], is right.
# Seen:      (for both backends) [2, 1, 6, 8] along axis 2: sees the future True, equal to no mask True, to no window
#            True; [2, 6, 6, 8] along axis 2: sees the future False; [2, 3, 6, 8] along axis 2: raises; given as
#            attention_mask: sees the future False; [2, 6, 8] along axis 1: sees the future False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip numpy==2.4.6 keras==3.15.1 jax==0.10.2
cat >"$folder/axis.py" <<'PYTHON'
import keras
import numpy as np

random = np.random.default_rng(0)


def attention(axis, **options):
    keras.utils.set_random_seed(0)
    return keras.layers.MultiHeadAttention(num_heads=2, key_dim=4, attention_axes=axis, **options)


def outcome(layer, inputs, **options):
    return keras.ops.convert_to_numpy(layer(inputs, inputs, **options))


def sees_the_future(shape, axis, **options):
    """Whether an output before the last time changes when the last input does."""
    inputs = random.standard_normal(shape, dtype=np.float32)
    changed = inputs.copy()
    changed[..., -1, :] += 1
    layer = attention(axis)
    try:
        first, second = (outcome(layer, each, **options) for each in (inputs, changed))
    except ValueError:
        return "raises"
    return bool(np.abs(first - second)[..., :-1, :].max() > 1e-3)


one = random.standard_normal((2, 1, 6, 8), dtype=np.float32)
plain, window = attention(2), attention(2, sliding_window=2)
free = outcome(plain, one)
no_mask = np.array_equal(outcome(plain, one, use_causal_mask=True), free)
window.build(one.shape, one.shape)
window.set_weights(plain.get_weights())
no_window = np.allclose(outcome(window, one), free, atol=1e-6)
triangle = np.tri(6, dtype=bool)[None, None]
seen = {
    "one": sees_the_future((2, 1, 6, 8), 2, use_causal_mask=True),
    "square": sees_the_future((2, 6, 6, 8), 2, use_causal_mask=True),
    "three": sees_the_future((2, 3, 6, 8), 2, use_causal_mask=True),
    "given": sees_the_future((2, 1, 6, 8), 2, attention_mask=triangle),
    "plain": sees_the_future((2, 6, 8), 1, use_causal_mask=True),
}
print(
    f"{keras.backend.backend()}: [2, 1, 6, 8] along axis 2: sees the future {seen['one']}, equal to no mask {no_mask}, "
    f"to no window {no_window}; [2, 6, 6, 8] along axis 2: sees the future {seen['square']}; [2, 3, 6, 8] along axis "
    f"2: {seen['three']}; given as attention_mask: sees the future {seen['given']}; [2, 6, 8] along axis 1: "
    f"sees the future {seen['plain']}"
)
expected = {"one": True, "square": False, "three": "raises", "given": False, "plain": False}
assert seen == expected and no_mask and no_window, "changed: look at it again"
PYTHON
for backend in numpy jax; do
    KERAS_HOME="$folder/keras" KERAS_BACKEND=$backend "$folder/venv/bin/python" "$folder/axis.py"
done
