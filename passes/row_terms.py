"""Terms of scores that change with the number of keys by what is constant along a row.

A softmax ignores that, a sigmoid does not. With ALiBi that counts from the last key (``arange(1 - n, 1) * slope``) the
probabilities of a row would change with each key that comes after it, and decoding with a cache, or padding, would
give something else than a full forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from sigswap.passes.nodes import shape_of, tensor_at

_MOST_OPS = 200  # that a bias is made by


def counts_from_the_last_key(term: Node, above: Iterable[Node]) -> bool:
    """Whether ``term`` [..., 1, keys] falls evenly from 0 at the last key; ``above``: what it comes from."""
    shape, ops = shape_of(term), set(above)
    if not shape or shape[-1] < 3 or shape[-2:-1] not in ((), (1,)) or len(ops) > _MOST_OPS:
        return False
    value = _computed(term, ops)
    if value is None or not value.dtype.is_floating_point:
        return False
    steps = value.double().diff(dim=-1)
    even = torch.allclose(steps, steps[..., :1].expand_as(steps), rtol=1e-3, atol=0)
    return even and bool((value[..., -1] == 0).all()) and bool((value[..., 0] != 0).any())


def _computed(term: Node, ops: set[Node]) -> Tensor | None:
    """The value of ``term`` on a CPU, with ones for what is not made by ops; None if an op cannot be run there."""
    values: dict[Node, Any] = {}
    try:
        for node in term.graph.nodes:
            if node not in ops:
                continue
            tensor = tensor_at(node)
            if node.op != "call_function":
                assert tensor is not None
                values[node] = torch.ones(tensor.shape, dtype=tensor.dtype)
            else:
                kwargs = {name: value for name, value in node.kwargs.items() if name not in ("device", "pin_memory")}
                args = tuple(torch.device("cpu") if isinstance(arg, torch.device) else arg for arg in node.args)
                run: Any = node.target
                values[node] = run(*map_arg(args, values.__getitem__), **map_arg(kwargs, values.__getitem__))
    except Exception:  # of a symbolic size, say
        return None
    value = values.get(term)
    return value if isinstance(value, Tensor) else None
