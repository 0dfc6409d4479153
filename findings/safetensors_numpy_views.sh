#!/usr/bin/env bash
# safetensors saves a transposed NumPy array as another one, without a word.
#
# Versions:  safetensors 0.8.0, numpy 2.4.6; CPU.
# Guess:     save_file stores the array that it is given, whatever its strides, as numpy.save does; or it refuses one
#            that is not contiguous, as the same function for PyTorch's tensors does.
# Behaviour: safetensors.numpy.save_file writes the array's shape and then the memory that it lies in, in the order of
#            that memory. Transposed arrays, Fortran-ordered ones and slices with a step come back with other numbers in
#            the right shape.
# Seen:      saved [[0, 3], [1, 4], [2, 5]], loaded [[0, 1], [2, 3], [4, 5]]; Fortran order: loaded equal False;
#            every other column: loaded equal False; numpy.save equal True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --disable-pip-version-check install -q numpy==2.4.6 safetensors==0.8.0
cat >"$folder/views.py" <<'PYTHON'
import sys

import numpy as np
import safetensors.numpy

file = sys.argv[1] + "/arrays"
rows = np.arange(6).reshape(2, 3)
arrays = {"transposed": rows.T, "fortran": np.asfortranarray(rows), "columns": rows[:, ::2]}
safetensors.numpy.save_file(arrays, file)
loaded = safetensors.numpy.load_file(file)
np.save(file + ".npy", rows.T)
by_numpy = np.array_equal(np.load(file + ".npy"), rows.T)
equal = {name: np.array_equal(loaded[name], array) for name, array in arrays.items()}
print(f"saved {rows.T.tolist()}, loaded {loaded['transposed'].tolist()}; Fortran order: loaded equal", end=" ")
print(f"{equal['fortran']}; every other column: loaded equal {equal['columns']}; numpy.save equal {by_numpy}")
in_memory_order = loaded["transposed"].tolist() == [[0, 1], [2, 3], [4, 5]]
seen = in_memory_order, *equal.values(), by_numpy
assert seen == (True, False, False, False, True), "changed: look at it again"
PYTHON
"$folder/venv/bin/python" "$folder/views.py" "$folder"
