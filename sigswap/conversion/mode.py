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
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from sigswap.conversion.state import OwnerState, SiteState
from sigswap.errors import Hint, UnknownCallError
from sigswap.functional.stand_ins import scaled_dot_product_attention, softmax
from sigswap.functional.torch_functions import FAMILIES, PRODUCTS, SWAPS


class SwapMode(TorchFunctionMode):
    """Swaps the planned softmax calls made while it is active; one instance serves one forward of one owner."""

    def __init__(self, state: OwnerState) -> None:
        super().__init__()
        self.state = state
        self.counts = {"softmax": 0, "sdpa": 0, "mha": 0, "product": 0, "shift": 0}
        self.product_of: SiteState | None = None  # the site whose product has just been made
        self.query_bias: Tensor | None = None  # w_h . q_i, between that product and its softmax
        self.shift_of: SiteState | None = None  # the site whose row shift has just been taken out
        self.swapped = False
        self.autograd = None if torch.compiler.is_compiling() else _autograd_state()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        family = FAMILIES.get(func)
        if family is None or (family == "product" and not self.state.intercepts_products):
            return func(*args, **kwargs)
        if family == "shift" and not self.state.shifted:
            return func(*args, **kwargs)
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
            return _zeros(func(*args, **kwargs))
        if self.autograd is not None and _autograd_state() != self.autograd:
            self._refuse_checkpoint()
        self.swapped = True
        if family == "softmax":
            if site_index in self.state.shifted and self.shift_of is not site:
                raise UnknownCallError(
                    f"{self.state.plan.path or 'the model'}: the row shift before its softmax was not seen, so it "
                    "cannot be taken out.",
                    hint=Hint("Convert the model in the form in which it runs."),
                )
            self.shift_of = None
            return self._softmax(site, args, kwargs)
        if family == "sdpa":
            return self._sdpa(site, *args, **kwargs)
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
        return softmax(*args, **kwargs, **bias, **site.terms)

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


def _zeros(reduced: Any) -> Any:
    """In place of a maximum over rows (a tensor, or values and indices)."""
    if isinstance(reduced, Tensor):
        return torch.zeros_like(reduced)
    return type(reduced)((torch.zeros_like(reduced[0]), reduced[1]))


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
            with mode:
                output = base.forward(self, *args, **kwargs)
            state.check_totals(mode.counts)
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
