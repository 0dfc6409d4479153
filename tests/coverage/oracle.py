"""Sigmoid attention in any model, by rules that share no code with sigswap's passes.

:func:`attention_calls` runs the softmax model once and follows marks from op to op, by the memory that tensors lie in:
the product of two tensors, neither of them a bare weight, is scores; a softmax of scores that another such product
takes up over the softmax's axis is attention, and so is the exponential of scores less their logsumexp. Inside
:func:`sigmoid` these calls, and every ``scaled_dot_product_attention``, are the sigmoid; logits that no product made
and that were put beside the scores (attention sinks) are no keys.
A call is known by the module that makes it and by its number among that module's calls.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.oracle import sdpa, sigmoid_of_scores

Key = tuple[str, str, int]  # family, path of the module, number of the call in that module's forward
SOFTMAXES = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax, torch._safe_softmax, torch._softmax}
MAXIMA = {torch.amax, Tensor.amax, torch.max, Tensor.max, torch.logsumexp, Tensor.logsumexp}
LOGSUMEXPS, EXPONENTIALS = {torch.logsumexp, Tensor.logsumexp}, {torch.exp, Tensor.exp}
PRODUCTS = {torch.einsum, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.baddbmm}
"""Which ops they are made of depends on sizes: a sum over one number is none."""
HEAD_MIXER = 64
"""A weight of so few numbers mixes heads; a larger one makes something new of what it multiplies."""

_MATMUL = {"mm", "bmm", "mv", "dot", "addmm", "addbmm", "baddbmm", "addmv", "linear", "matmul", "convolution", "einsum"}
_SUMS = {"sum", "mean"}
_COPIES = {"_to_copy", "clone", "detach", "alias", "copy_", "lift_fresh", "contiguous", "empty_like"}


@dataclasses.dataclass(frozen=True)
class Attention:
    """What feeds attention in one run: softmaxes (exponentials among them), fused attentions, and the row maxima that
    are taken from scores.

    ``sinks``: of softmaxes over more than the keys, how many logits stand before and behind those.
    """

    softmaxes: frozenset[Key]
    fused: frozenset[Key]
    shifts: frozenset[Key]
    sinks: Mapping[Key, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.softmaxes) + len(self.fused)


class _Calls(TorchFunctionMode):
    """Numbers the calls that may be attention, and hands them to ``softmax``, ``fused`` and ``maximum``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.stack: list[tuple[str, Counter[str]]] = [("", Counter())]
        self.inside = False

    def softmax(self, key: Key, call: Callable[..., Tensor], scores: Tensor, dim: int, dtype: Any) -> Tensor:
        raise NotImplementedError

    def fused(self, key: Key, call: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        raise NotImplementedError

    def maximum(self, key: Key, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def exponential(self, key: Key, call: Callable[..., Tensor], logits: Tensor) -> Tensor:
        raise NotImplementedError

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        handles = []
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handles.append(module.register_forward_pre_hook(self._enter(path), prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            # By name, too: a mode gets F.multi_head_attention_forward whole, and is off inside it.
            with (
                mock.patch.object(F, "softmax", self._named(F.softmax)),
                mock.patch.object(F, "scaled_dot_product_attention", self._named(F.scaled_dot_product_attention)),
                self,
            ):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        return lambda module, args: self.stack.append((path, Counter()))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def _named(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._call(function, args, kwargs)

    def _key(self, family: str) -> Key:
        path, counts = self.stack[-1]
        counts[family] += 1
        return family, path, counts[family] - 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._call(func, args, kwargs or {})

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.inside:
            return func(*args, **kwargs)
        if func in SOFTMAXES:
            given = dict(zip(("input", "dim"), args, strict=False)) | kwargs
            scores = given.get("input", given.get("self"))
            dim, dtype = given.get("dim"), given.get("dtype")
            if dim is None:
                dim = 0 if scores.dim() in (0, 1, 3) else 1
            call = lambda: func(*args, **kwargs)
            return self._within(self.softmax, self._key("softmax"), call, scores, dim, dtype)
        if func in (F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention):
            return self._within(self.fused, self._key("fused"), func, args, kwargs)
        if func in MAXIMA:
            return self._within(self.maximum, self._key("maximum"), func, args, kwargs)
        if func in EXPONENTIALS:
            logits = args[0] if args else kwargs["input"]
            return self._within(self.exponential, self._key("exponential"), lambda: func(*args, **kwargs), logits)
        return func(*args, **kwargs)

    def _within(self, handler: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        self.inside = True
        try:
            return handler(*arguments, **keywords)
        finally:
            self.inside = False


# Which calls are attention.


class _Marks(TorchDispatchMode):
    """What is known of each piece of memory: "weight", "scores", the keys of softmaxes, and products to be summed."""

    def __init__(self, weights: Iterator[Tensor]) -> None:
        super().__init__()
        self.alive: list[Any] = []  # so that no address is used twice
        self.marks: dict[int, set[Any]] = {}
        self.attention: set[Key] = set()
        self.sizes: dict[Key, set[int]] = {}  # of the axis that a softmax is over, and of the scores put together there
        self.sinks: dict[Key, tuple[int, int]] = {}
        self.shifts: set[Key] = set()
        for weight in weights:
            self.of(weight).add("weight")

    def of(self, tensor: Tensor) -> set[Any]:
        if tensor.layout is not torch.strided:
            return set()
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # a tensor of functorch's around another one
            return self.of(torch._C._functorch.get_unwrapped(tensor))
        self.alive.append(storage)
        return self.marks.setdefault(storage._cdata, set())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
        if given and made and not all(x.layout is torch.strided for x in (*given, *made)):
            return output
        before = {id(x): set(self.of(x)) for x in given}
        name = func._overloadpacket.__name__ if hasattr(func, "_overloadpacket") else str(func)
        marks = self._marks(name, given, before, made)
        if name == "cat":
            marks = marks | self._beside(args, kwargs, before)
        old = {id(x) for x in given}
        for tensor in made:
            own = self.of(tensor)
            if id(tensor) in old:
                own.discard("weight")
            own |= marks
        return output

    def _beside(self, args: Any, kwargs: Any, before: dict[int, set[Any]]) -> set[Any]:
        """A mark of what ``cat`` puts before and behind scores: how many logits, and how many there are then. Of scores
        beside scores: their sizes."""
        parts, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
        scores = ["scores" in before[id(part)] for part in parts]
        if not any(scores):
            return set()
        sizes = [part.shape[dim] for part in parts]
        if all(scores):
            return {("parts", *sizes)}
        first, last = scores.index(True), len(scores) - scores[::-1].index(True)
        return {("beside", sum(sizes[:first]), sum(sizes[last:]), sum(sizes))}

    def _marks(self, name: str, given: list[Tensor], before: dict[int, set[Any]], made: list[Tensor]) -> set[Any]:
        values = [x for x in given if x.is_floating_point()]
        marks = set().union(*(before[id(x)] for x in values)) if values else set()
        factors = values[-2:] if name not in ("convolution", "linear") else values[:2]
        if name in _MATMUL and len(factors) == 2:
            return self.product(factors, before)
        if name.startswith("_scaled_dot_product"):
            return {"scores"}
        if name in _SUMS:
            self.attention |= {mark[1] for mark in marks if mark[0] == "summand"}
            if "outer" in marks:
                marks.add("scores")
        elif name in ("mul", "mul_") and len(values) == 2 and not any("weight" in before[id(x)] for x in values):
            first, second = values
            kept = {mark for mark in marks if mark not in ("outer",) and mark[0] != "summand"}
            if made and made[0].numel() > min(first.numel(), second.numel()):
                kept.add("outer")
                for mine, other in ((first, second), (second, first)):
                    keys = {mark[1] for mark in before[id(mine)] if mark[0] == "softmax"}
                    others = {mark[1] for mark in before[id(other)] if mark[0] == "softmax"}
                    kept |= {("summand", key) for key in keys - others}
            return kept
        elif name in ("sub", "sub_") and len(values) == 2 and "scores" in before[id(values[0])]:
            second = before[id(values[1])]
            self.shifts |= {mark[1] for mark in second if mark[0] == "maximum"}
            if any(mark[0] == "logsumexp" for mark in second):
                marks.add("normalised")
        kept = {mark for mark in marks if mark != "outer" and mark[0] != "summand"}
        if not all("weight" in before[id(x)] for x in values) or not values:
            kept.discard("weight")
        return kept

    def product(self, factors: list[Tensor], before: dict[int, set[Any]]) -> set[Any]:
        weights = [x for x in factors if "weight" in before[id(x)]]
        if weights:
            mixers = [x for x in weights if x.numel() <= HEAD_MIXER]
            mixed = set().union(*(before[id(x)] for x in factors)) - {"weight", "outer"} if mixers else set()
            return {mark for mark in mixed if mark[0] != "summand"}
        for tensor, other in (factors, factors[::-1]):
            keys = {mark[1] for mark in before[id(tensor)] if mark[0] == "softmax"}
            self.attention |= {key for key in keys if self.sizes[key] & set(other.shape) or key in self.sinks}
        return {"scores"}


class _Finder(_Calls):
    def __init__(self, model: nn.Module, marks: _Marks) -> None:
        super().__init__(model)
        self.marks = marks
        self.fused_calls: set[Key] = set()

    def softmax(self, key: Key, call: Callable[..., Tensor], scores: Tensor, dim: int, dtype: Any) -> Tensor:
        before = set(self.marks.of(scores))
        known = "scores" in before
        output = call()
        marks = self.marks.of(output)
        marks.clear()
        if known:
            marks.add(("softmax", key))
            size = scores.shape[dim]
            self.marks.sizes[key] = {size}
            for mark in before:
                if mark[0] == "parts" and sum(mark[1:]) == size:
                    self.marks.sizes[key] |= set(mark[1:])
                if mark[0] == "beside" and mark[3] == size:
                    self.marks.sinks[key] = mark[1:3]
        return output

    def fused(self, key: Key, call: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        self.fused_calls.add(key)
        return call(*args, **kwargs)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.inside or func not in PRODUCTS:
            return super()._call(func, args, kwargs)
        factors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()][-2:]
        before = {id(x): set(self.marks.of(x)) for x in factors}
        output = self._within(func, *args, **kwargs)
        if len(factors) == 2:
            marks = self.marks.of(output)
            marks.clear()
            marks |= self.marks.product(factors, before)
        return output

    def maximum(self, key: Key, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        values = output if isinstance(output, Tensor) else output[0]
        if values.is_floating_point():
            self.marks.of(values).add(("maximum", key))
            if call in LOGSUMEXPS:
                self.marks.of(values).add(("logsumexp", key))
        return output

    def exponential(self, key: Key, call: Callable[..., Tensor], logits: Tensor) -> Tensor:
        return self.softmax(key, call, logits, -1, None) if "normalised" in self.marks.of(logits) else call()


def attention_calls(model: nn.Module, run: Callable[[], Any]) -> Attention:
    """What of one run of the softmax model is attention."""
    held = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        held += [x for x in tree_leaves(list(vars(module).values())) if isinstance(x, Tensor)]
    marks = _Marks(iter(held))
    finder = _Finder(model, marks)
    with torch.no_grad(), finder.open(), marks:
        run()
    shifts = marks.shifts if marks.attention else set()
    return Attention(frozenset(marks.attention), frozenset(finder.fused_calls), frozenset(shifts), marks.sinks)


# The model with them as sigmoid.


class _Sigmoid(_Calls):
    def __init__(self, model: nn.Module, attention: Attention) -> None:
        super().__init__(model)
        self.attention = attention
        self.swapped = 0

    def softmax(self, key: Key, call: Callable[..., Tensor], scores: Tensor, dim: int, dtype: Any) -> Tensor:
        if key not in self.attention.softmaxes:
            return call()
        self.swapped += 1
        scores = scores if dtype is None or dtype is False else scores.to(dtype)
        before, behind = self.attention.sinks.get(key, (0, 0))
        keys = scores.narrow(dim, before, scores.shape[dim] - before - behind)
        sigmoids = sigmoid_of_scores(keys, dim)
        if not before and not behind:
            return sigmoids
        return F.pad(sigmoids.movedim(dim, -1), (before, behind)).movedim(-1, dim)

    def fused(self, key: Key, call: Callable[..., Tensor], args: Any, kwargs: Any) -> Tensor:
        self.swapped += 1
        return sdpa(*args, **kwargs)

    def exponential(self, key: Key, call: Callable[..., Tensor], logits: Tensor) -> Tensor:
        return self.softmax(key, call, logits, -1, None)

    def maximum(self, key: Key, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        if key not in self.attention.shifts:
            return output
        if isinstance(output, Tensor):
            return torch.zeros_like(output)
        return type(output)((torch.zeros_like(output[0]), output[1]))


@contextlib.contextmanager
def sigmoid(model: nn.Module, attention: Attention) -> Iterator[_Sigmoid]:
    """Runs ``model`` as sigmoid attention inside the ``with``."""
    mode = _Sigmoid(model, attention)
    with mode.open():
        yield mode
