#!/usr/bin/env bash
# Of ONNX's Attention with a soft cap, onnx's reference gives capped scores for the raw ones; onnxruntime has them raw.
#
# Versions:  onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6; CPU, float32, opsets 23 and 24.
# Guess:     the fourth output of Attention is, by its specification, what qk_matmul_output_mode says: 0, the default,
#            the product of query and key; 1 after the soft cap; 2 after the mask, too; 3 after softmax. Onnx's own
#            reference evaluator, with which a port is checked, has it so.
# Behaviour: the reference has one variable for the product and overwrites it by the soft cap, so that mode 0 is mode 1.
#            onnxruntime gives the product. In mode 2 they differ at hidden positions: -inf in the reference, the least
#            float in onnxruntime, where isinf finds none. The first output, attention's result, is equal in all.
# Seen:      opset 23: mode 0 reference capped, onnxruntime raw; mode 1 reference capped, onnxruntime capped;
#            hidden in mode 2: reference -inf, onnxruntime -3.4028235e+38; attention equal
#            opset 24: the same
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cat >"$folder/cap.py" <<'PYTHON'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

cap, shape = 2.0, (1, 2, 3, 4)
random = np.random.default_rng(0)
query, key, value = (2 * random.standard_normal(shape, dtype=np.float32) for _ in range(3))
mask = np.array([[True, False, True]] * 3)
inputs = {"query": query, "key": key, "value": value, "mask": mask}
raw = query @ key.swapaxes(-2, -1) / np.sqrt(shape[-1])
capped = cap * np.tanh(raw / cap)


def outputs(opset, mode):
    """Of the reference and of onnxruntime: attention, and its fourth output."""
    node = helper.make_node(
        "Attention", list(inputs), ["attention", "", "", "scores"], softcap=cap, qk_matmul_output_mode=mode
    )
    kinds = [TensorProto.FLOAT] * 3 + [TensorProto.BOOL]
    given = [
        helper.make_tensor_value_info(name, kind, each.shape)
        for (name, each), kind in zip(inputs.items(), kinds, strict=True)
    ]
    wanted = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, size)
        for name, size in (("attention", shape), ("scores", raw.shape))
    ]
    model = helper.make_model(
        helper.make_graph([node], "cap", given, wanted), opset_imports=[helper.make_opsetid("", opset)], ir_version=11
    )
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return ReferenceEvaluator(model).run(None, inputs), session.run(None, inputs)


def told(scores):
    known = {"raw": raw, "capped": capped}
    return next((name for name, each in known.items() if np.allclose(scores, each, atol=1e-5)), "neither")


for opset in (23, 24):
    modes = {mode: outputs(opset, mode) for mode in range(4)}
    first, second = ([told(each[1]) for each in modes[mode]] for mode in (0, 1))
    hidden = [each[1][..., 1] for each in modes[2]]
    equal = all(np.allclose(reference[0], other[0], atol=1e-5) for reference, other in modes.values())
    print(
        f"opset {opset}: mode 0 reference {first[0]}, onnxruntime {first[1]}; mode 1 reference {second[0]}, "
        f"onnxruntime {second[1]}; hidden in mode 2: reference {hidden[0].max()!s}, onnxruntime {hidden[1].max()!s}; "
        f"attention {'equal' if equal else 'differs'}"
    )
    assert first == ["capped", "raw"] and second == ["capped", "capped"] and equal, "changed: look at it again"
    assert np.isneginf(hidden[0]).all() and np.isfinite(hidden[1]).all(), "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/cap.py"
