#!/usr/bin/env bash
# torch.utils.checkpoint: after a function that failed, backward passes elsewhere run that function again.
#
# Versions:  torch 2.11.0, CPU; torch 2.14.1 does not do it.
# Guess:     an error in a checkpointed function leaves nothing behind: a training loop may log it, keep it, and go on
#            with the next batch.
# Behaviour: with use_reentrant=False the context in which tensors are saved is a generator that is left suspended when
#            the function fails. Its hooks for saved tensors stay on for as long as the error, and with it the traceback
#            and the generator, is alive: in the except block, and longer if the error is kept. Any graph that is built
#            meanwhile saves its tensors by these hooks, and its backward pass calls the function that failed, with the
#            arguments that it failed with. When the error is gone, so are the hooks.
# Seen:      while the error is handled: ValueError: a batch that is not right
#            while the error is kept: ValueError: a batch that is not right
#            when it is gone: fine
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check install -q"
$pip torch==2.11.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.utils.checkpoint import checkpoint


def fails(x):
    raise ValueError("a batch that is not right")


def step():
    """What a step gives that has nothing to do with that function."""
    weight = torch.ones(3, requires_grad=True)
    try:
        weight.exp().sum().backward()
        return "fine"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


found = {}
kept = None
try:
    checkpoint(fails, torch.ones(3, requires_grad=True), use_reentrant=False)
except ValueError as error:
    kept = error
    found["while the error is handled"] = step()
found["while the error is kept"] = step()
kept = None
found["when it is gone"] = step()
for name, each in found.items():
    print(f"{name}: {each}")
again = "ValueError: a batch that is not right"
assert list(found.values()) == [again, again, "fine"], "changed: look at it again"
PYTHON
