#!/usr/bin/env bash
# In ONNX's Attention, to say that no key is padding changes what causal means.
#
# Versions:  onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6; CPU, opset 24.
# Guess:     nonpad_kv_seqlen counts the keys that are no padding, so one that counts all keys of each sequence changes
#            nothing; is_causal then begins at the top left, as it does without, and as in PyTorch.
# Behaviour: given together, the causal mask is aligned at the bottom right: the last row is at the last key that is no
#            padding. Where there are more keys than rows the results differ, though both hide no padding. Both onnx's
#            reference and onnxruntime do so (the operator's text says it, under is_causal), and neither says a word.
# Seen:      3 rows, 5 keys: causal alone: reference top left, onnxruntime top left; with nonpad_kv_seqlen=5: reference
#            bottom right, onnxruntime bottom right; not causal: nonpad_kv_seqlen=5 changes nothing: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cat >"$folder/causal.py" <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import helper
from onnx.reference import ReferenceEvaluator

random = np.random.default_rng(0)
query, key, value = (random.normal(size=(1, 2, rows, 8)).astype(np.float32) for rows in (3, 5, 5))


def run(is_causal: int, lengths: list[int] | None) -> list[np.ndarray]:
    """By onnx's reference, and by onnxruntime."""
    inputs = {"query": query, "key": key, "value": value}
    if lengths is not None:
        inputs["lengths"] = np.array(lengths, dtype=np.int64)
    names = ["query", "key", "value", "", "", "", "lengths"][: 3 if lengths is None else 7]
    node = helper.make_node("Attention", names, ["out"], is_causal=is_causal)
    info = helper.make_tensor_value_info
    given = [info(name, helper.np_dtype_to_tensor_dtype(each.dtype), each.shape) for name, each in inputs.items()]
    graph = helper.make_graph([node], "graph", given, [info("out", onnx.TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [ReferenceEvaluator(model).run(None, inputs)[0], session.run(None, inputs)[0]]


def softmax_attention(offset: int) -> np.ndarray:
    """Row i sees the keys 0 ... i + offset."""
    scores = query @ key.swapaxes(2, 3) / np.sqrt(8)
    weights = np.where(np.tril(np.ones((3, 5), bool), offset), np.exp(scores), 0)
    return weights / weights.sum(-1, keepdims=True) @ value


def alignment(out: np.ndarray) -> str:
    for name, offset in (("top left", 0), ("bottom right", 2)):
        if np.allclose(out, softmax_attention(offset), atol=1e-5):
            return name
    return "other"


alone, together = ([alignment(out) for out in run(1, lengths)] for lengths in (None, [5]))
same = all(np.allclose(*pair, atol=1e-5) for pair in zip(run(0, None), run(0, [5]), strict=True))
print(f"3 rows, 5 keys: causal alone: reference {alone[0]}, onnxruntime {alone[1]}; with nonpad_kv_seqlen=5:", end=" ")
print(f"reference {together[0]}, onnxruntime {together[1]}; not causal: nonpad_kv_seqlen=5 changes nothing: {same}")
assert (alone, together, same) == (["top left"] * 2, ["bottom right"] * 2, True), "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/causal.py"
