"""The eager carrier: a module that owns attention runs its forward under a mode that swaps exactly the planned calls.

``convert`` makes each owning module an instance of a subclass of its own class (:func:`swapped_class`), whose forward
runs the original forward under :class:`SwapMode`. A call is addressed by its function family and its position among
that family's calls in one forward of the owner, so that a router's softmax beside the attention's stays what it is.
"""

from __future__ import annotations

import copyreg
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from sigswap.conversion.state import OwnerState, SiteState
from sigswap.errors import Hint, UnknownCallError
from sigswap.functional.flex import flex_attention
from sigswap.functional.stand_ins import logarithm, ones, scaled_dot_product_attention, softmax, unshifted, weighted
from sigswap.functional.torch_functions import FAMILIES, NOT_IN_EVERY_PLAN, PRODUCTS, SWAPS


class SwapMode(TorchFunctionMode):
    """Swaps the planned softmax calls made while it is active; one instance serves one forward of one owner."""

    def __init__(self, state: OwnerState) -> None:
        super().__init__()
        self.state = state
        self.counts = {
            "softmax": 0,
            "log_softmax": 0,
            "exp": 0,
            "flex": 0,
            "sdpa": 0,
            "mha": 0,
            "product": 0,
            "shift": 0,
        }
        self.product_of: SiteState | None = None  # the site whose product has just been made
        self.query_bias: Tensor | None = None  # w_h . q_i, between that product and its softmax
        self.shift_of: SiteState | None = None  # the site whose row shift has just been taken out
        self.exponential: tuple[SiteState, Tensor] | None = None  # the site of an exp, its scores, until its division
        self.by_logarithm = False  # the call is a log_softmax
        self.swapped = False
        self.autograd = None if torch.compiler.is_compiling() else _autograd_state()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        family = FAMILIES.get(func)
        if family is None or (family == "product" and not self.state.intercepts_products):
            return func(*args, **kwargs)
        if family == "shift" and not self.state.shifted:
            return func(*args, **kwargs)
        if family in NOT_IN_EVERY_PLAN and family not in self.state.families:
            return func(*args, **kwargs)
        if family == "division":
            return func(*args, **kwargs) if self.exponential is None else self._divided(func, args, kwargs)
        position = self.counts[family]
        self.counts[family] = position + 1
        site_index = self.state.site_of(family, position)
        if site_index < 0:
            return func(*args, **kwargs)
        site = self.state.site(site_index)
        if family == "product":
            return self._product(site, func, args, kwargs)
        if family == "shift":
            self.shift_of = site
            return unshifted(func(*args, **kwargs))
        if self.autograd is not None and _autograd_state() != self.autograd:
            self._refuse_checkpoint()
        self.swapped = True
        if family in ("softmax", "log_softmax", "exp"):
            if site_index in self.state.shifted and self.shift_of is not site:
                raise UnknownCallError(
                    f"{self.state.plan.path or 'the model'}: the row shift before its softmax was not seen, so it "
                    "cannot be taken out.",
                    hint=Hint("Convert the model in the form in which it runs."),
                )
            self.shift_of = None
            if family == "exp":
                return self._exponential(site, func, args, kwargs)
            self.by_logarithm = family == "log_softmax"
            probs = self._softmax(site, args, kwargs)
            return logarithm(probs) if self.by_logarithm else probs
        if family == "sdpa":
            return self._sdpa(site, *args, **kwargs)
        if family == "flex":
            return self._flex(site, *args, **kwargs)
        return self._whole(site, func, args, kwargs)

    def _softmax(self, site: SiteState, args: Any, kwargs: Any) -> Tensor:
        scores = args[0] if args else kwargs["input"]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if dim is None:
            dim = 0 if scores.dim() in (0, 1, 3) else 1  # as F.softmax chooses it
        if site.acts_on_product and self.product_of is not site:
            raise UnknownCallError(
                f"{self.state.plan.path or 'the model'}: the product of query and key was not seen before its softmax, "
                "so QK-norm and query_bias cannot act.",
                hint=Hint("Convert the model in the form (attention implementation) in which it runs."),
            )
        bias = site.row_bias(scores, dim % scores.dim(), self.query_bias)
        self.product_of = self.query_bias = None
        return softmax(*args, **kwargs, **bias, **site.terms, extra=site.plan.extra)

    def _exponential(self, site: SiteState, func: Any, args: Any, kwargs: Any) -> Tensor:
        """The first part of a softmax by hand: its numbers are ones until its division, times what multiplies them."""
        scores = args[0] if args else kwargs["input"]
        in_place = func.__name__ == "exp_"
        self.exponential = site, scores.clone() if in_place else scores
        return scores.fill_(1.0) if in_place else ones(scores)

    def _divided(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        assert self.exponential is not None
        (site, scores), self.exponential = self.exponential, None
        weights = args[0] if args else kwargs["input"]
        total = args[1] if len(args) > 1 else kwargs["other"]
        if not isinstance(total, Tensor) or weights.shape != scores.shape:
            raise UnknownCallError(
                f"{self.state.plan.path or 'the model'}: its softmax is written by hand, and another division than its "
                "own came after its exp.",
                hint=Hint("Convert the model in the form in which it runs."),
            )
        assert site.plan.by_hand is not None
        axis, is_weighted = site.plan.by_hand
        scores = weighted(scores, weights) if is_weighted else scores
        probs = self._softmax(site, (scores, axis), {}).to(torch.promote_types(weights.dtype, total.dtype))
        return weights.copy_(probs) if func.__name__ in ("div_", "divide_", "true_divide_", "__itruediv__") else probs

    def uncompiled(self) -> AbstractContextManager[None]:
        """While it is open, flex_attention does not compile itself: this mode sees it whole."""
        if "flex" not in self.state.families or torch.compiler.is_compiling():
            return nullcontext()
        stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
        return stance

    def check(self) -> None:
        """At the end of the owner's forward. Raises UnknownCallError if a softmax by hand was not whole."""
        if self.exponential is not None:
            raise UnknownCallError(
                f"{self.state.plan.path or 'the model'}: its softmax is written by hand, and the division after its "
                "exp was not seen.",
                hint=Hint("Convert the model in the form in which it runs."),
            )
        self.state.check_totals(self.counts)

    def _sdpa(
        self,
        site: SiteState,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        query, key = site.normalized(query, key)
        return scaled_dot_product_attention(query, key, value, *args, **kwargs, **site.sdpa_bias(query), **site.terms)

    def _flex(self, site: SiteState, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Any:
        query, key = site.normalized(query, key)
        return flex_attention(query, key, value, *args, **site.sdpa_bias(query), **site.terms)

    def _whole(self, site: SiteState, func: Any, args: Any, kwargs: Any) -> Any:
        return SWAPS[func].stand_in(site.attention, *args, **kwargs)

    def _refuse_checkpoint(self) -> None:
        """A checkpoint inside the owner runs again in backward, when this mode is not active: as softmax."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_locals.get("mode") is not self:
            if frame.f_code.co_filename == checkpoint.__file__:
                raise UnknownCallError(
                    f"{self.state.plan.path or 'the model'} runs its attention inside torch.utils.checkpoint, which "
                    "would recompute it in backward as softmax.",
                    hint=Hint("Checkpoint the whole module instead of a part of its forward."),
                )
            frame = frame.f_back

    def _product(self, site: SiteState, func: Any, args: Any, kwargs: Any) -> Tensor:
        plan = site.product
        factors, rebuild = factors_of(func, args, kwargs)
        self.product_of = site
        query, key, self.query_bias = site.transformed_factors(factors[plan.query_arg], factors[plan.key_arg], plan)
        return rebuild(*((query, key) if plan.query_arg == 0 else (key, query)))


def _autograd_state() -> tuple[Any, ...]:
    """What every checkpoint changes for its body: grad mode (reentrant) or the hooks for saved tensors."""
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)


def factors_of(func: Any, args: Any, kwargs: Any) -> tuple[tuple[Tensor, Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The two factors of a product call, and the call as a function of them."""
    if func is torch.einsum:
        operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
        return (operands[0], operands[1]), lambda first, second: func(args[0], first, second, **kwargs)
    named = PRODUCTS[func]
    bound = dict(zip(named, args, strict=False)) | kwargs
    first, second = named[-2:]

    def rebuild(new_first: Tensor, new_second: Tensor) -> Tensor:
        changed = bound | {first: new_first, second: new_second}
        positional = [changed.pop(name) for name in named]
        product: Tensor = func(*positional, **changed)
        return product

    return (bound[first], bound[second]), rebuild


_SWAPPED: dict[type, type] = {}


def swapped_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` whose forward runs under a :class:`SwapMode`; one per class, with its name."""
    if base not in _SWAPPED:

        @functools.wraps(base.forward)
        def sigswap_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            state: OwnerState = self.sigswap
            if state.softmax:
                return base.forward(self, *args, **kwargs)
            if state.observer is not None:
                return state.observer.run(self, base.forward, args, kwargs)
            mode = SwapMode(state)
            with mode, mode.uncompiled():
                output = base.forward(self, *args, **kwargs)
            mode.check()
            if not mode.swapped and not state.plan.may_skip:
                raise UnknownCallError(
                    f"{state.plan.path or 'the model'} ran without any of the attention calls that were swapped when "
                    "it was converted (was its attention implementation changed since?).",
                    hint=Hint("Revert the model, and convert it again in the form in which you use it."),
                )
            return state.finish(output)

        _SWAPPED[base] = _subclass(base, sigswap_forward)
    return _SWAPPED[base]


def base_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that ``module`` had before :func:`swapped_class`, or None."""
    return getattr(type(module), "_sigswap_base", None)


def _subclass(base: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        # The subclass exists only at run time: pickle and deepcopy name its base, and make it anew.
        reduced = base.__reduce_ex__(self, protocol)
        if reduced[0] is copyreg.__newobj__ and reduced[1][0] is type(self):  # type: ignore[attr-defined]
            return (_new_instance, (base, *reduced[1][1:]), *reduced[2:])
        return reduced

    body = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce_ex,
        "_sigswap_base": base,
        "forward": forward,
    }
    metaclass: Any = type(base)
    made: type[nn.Module]
    if not any("__init_subclass__" in vars(parent) for parent in base.__mro__[:-1]):
        made = metaclass(base.__name__, (base,), body)
    else:  # a hook of the base's would run for a class that is none of the user's (and may enter it in a registry)
        made = metaclass(base.__name__, (nn.Module,), body)
        made.__bases__ = (base,)
    return made


def _new_instance(base: type[nn.Module], *args: Any) -> nn.Module:
    cls = swapped_class(base)
    return cls.__new__(cls, *args)
