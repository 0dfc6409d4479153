"""What a converted module carries: the plan of its calls, and the new parameters, under ``<owner>.sigswap.*``.

A plan is plain data that JSON can hold, so that a saved model is rebuilt without looking for its sites again.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigswap.config import SigmoidConfig
from sigswap.conversion.head_axis import ONE_HEAD, SDPA_HEADS, HeadAxis, Unmerged, of_this_rank
from sigswap.conversion.places import SWAPPED_FORWARD, UNSEEN_FILES
from sigswap.conversion.switches import Switch
from sigswap.errors import ConfigError, Hint, UnknownCallError
from sigswap.functional.attention import FirstToken
from sigswap.functional.multi_head import AttentionArguments, sigmoid_heads

_ANOTHER_PATH = "this input takes another path through its code."
_CONVERT_EACH_PATH = Hint(
    "Revert the model and convert it again with {example_inputs} for each path, in a list.", {"example_inputs": ""}
)
FAR = 4
"""By how much a run may be longer than what a calibration saw, before there is a warning."""
NOT_ATTENTION = -1  # a planned call that stays what it is (a router's softmax)
decided_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Those that were converted or reverted. What is softmax in them is so by the user's choice. Where a graph has nothing
converted in it, ``backend="sigswap"`` swaps it all the same, as Dynamo cannot tell it from an equal one, and warns."""


@dataclasses.dataclass(frozen=True)
class AxisPlan:
    """One factor of a q.k product: the axis of head_dim, counted from the end, and that of the heads.

    ``scale`` is the number by which the module has multiplied the factor before the product; a norm has to put it back.
    """

    dim_axis: int
    head_axis: HeadAxis
    scale: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        return {"dim_axis": self.dim_axis, "scale": self.scale, **self.head_axis.to_fields()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(HeadAxis.from_fields(state, "") if "merged" in state else state)


@dataclasses.dataclass(frozen=True)
class ProductPlan:
    """The product of query and key at a site that computes its own scores.

    ``rows_in_order``: the query without head_dim reshapes to the scores without their key axis; or else it does with
    its axes in ``row_order``, if there is one (``einsum("bqhd,bkhd->bhqk")``: 0, 2, 1).
    """

    query_arg: int
    key_arg: int
    query: AxisPlan
    key: AxisPlan
    rows_in_order: bool
    row_order: tuple[int, ...] | None = None

    def ordered(self, x: Tensor) -> Tensor:
        """``x``, with the axes of the query without head_dim, and others behind them, so that it does."""
        if self.row_order is None:
            return x
        return x.permute(*self.row_order, *range(len(self.row_order), x.dim()))

    def to_dict(self) -> dict[str, Any]:
        data = {"query_arg": self.query_arg, "key_arg": self.key_arg, "rows_in_order": self.rows_in_order}
        order = {} if self.row_order is None else {"row_order": self.row_order}
        return {**data, "query": self.query.to_dict(), "key": self.key.to_dict(), **order}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ProductPlan:
        factors = {name: AxisPlan(**HeadAxis.from_fields(data[name], "")) for name in ("query", "key")}
        order = data.get("row_order")
        return cls(**{**data, **factors, "row_order": None if order is None else tuple(order)})

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update({"row_order": None, **state})  # pickles from before have none


@dataclasses.dataclass(frozen=True)
class SitePlan:
    """One attention of an owner.

    ``head_axis`` is that of the scores, ``sdpa_head_axis`` that of the query that scaled_dot_product_attention gets.
    ``row_axis``: of the scores, from the end; None: not known. ``scores``: how many axes they have, and which one, from
    the end, is the keys'; None: they are not computed by the owner, or version 0.1 wrote the plan.
    ``extra``: how many logits stand before and behind those of the keys (attention sinks). ``weighted``: of a softmax
    by hand, whether what its exp gives is multiplied before it is divided. ``undivided``: its exp gives the
    probabilities, for the logsumexp of the scores was subtracted from them.
    """

    kind: str
    heads: int
    key_heads: int
    head_dim: int | None
    head_axis: HeadAxis = ONE_HEAD
    sdpa_head_axis: HeadAxis = SDPA_HEADS
    mask: str = "none"
    product: ProductPlan | None = None
    row_axis: int | None = None
    scores: tuple[int, int] | None = None
    extra: tuple[int, int] = (0, 0)
    weighted: bool = False
    undivided: bool = False

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(self) | self.head_axis.to_fields() | self.sdpa_head_axis.to_fields("sdpa_")
        if self.scores is None:
            del data["scores"]
        if self.product is not None:
            data["product"] = self.product.to_dict()
        newer = {"extra": (0, 0), "weighted": False, "undivided": False}  # left out where version 0.1 can do without
        return {name: value for name, value in data.items() if name not in newer or value != newer[name]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SitePlan:
        product = None if data["product"] is None else ProductPlan.from_dict(data["product"])
        scores, extra = data.get("scores"), tuple(data.get("extra", (0, 0)))
        plain = {"product": product, "scores": None if scores is None else tuple(scores), "extra": extra}
        return cls(**{**HeadAxis.from_fields(data, "", "sdpa_"), **plain})

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(HeadAxis.from_fields(state, "", "sdpa_") if "merged" in state else state)


@dataclasses.dataclass(frozen=True)
class Turns:
    """The calls at one place in one forward of the owner: in a loop there are several.

    ``sites``: of each turn, its site or NOT_ATTENTION; one entry where that is the same for all, however many there
    are. ``counts``: how many there were, in each of the forwards that were seen.
    """

    sites: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, forwards: Iterable[tuple[int, ...]]) -> Turns | None:
        """From the turns of several forwards, each of which starts as the longest does; None if one does not."""
        seen = list(forwards)
        longest = max(seen, key=len)
        if any(longest[: len(turns)] != turns for turns in seen):
            return None
        return cls(longest[:1] if len(set(longest)) == 1 else longest, tuple(sorted({len(turns) for turns in seen})))

    def forwards(self) -> Iterator[tuple[int, ...]]:
        every = self.sites * self.counts[-1] if len(self.sites) == 1 else self.sites
        return (every[:count] for count in self.counts)


@dataclasses.dataclass(frozen=True)
class OwnerPlan:
    """The calls of one owner: ``places["softmax"][PLACE]`` are those of softmax that its code makes at PLACE (see
    :mod:`sigswap.conversion.places`). Those of "product" make scores, those of "shift" are a row's maximum (or
    logsumexp) that is taken out of them.

    ``may_skip``: a forward was seen that attended nothing. ``channel_axis`` (from the end) is the channels' axis of the
    owner's output, ``channels`` their number.

    Version 0.1 had no places. ``calls["softmax:0"]`` is the site of the first softmax, or NOT_ATTENTION, counted over
    all below the owner. ``repeats`` names, for a family whose calls come from one place in the code (a loop over
    chunks), the site of any further call, and ``place`` the code lines of that place for softmax. ``totals`` are the
    numbers of calls that one forward was seen to make, by family.
    """

    path: str
    sites: tuple[SitePlan, ...]
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    repeats: Mapping[str, int] = dataclasses.field(default_factory=dict)
    channel_axis: int = -1
    channels: int | None = None
    totals: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    may_skip: bool = False
    place: tuple[tuple[str, int], ...] = ()
    places: Mapping[str, Mapping[str, Turns]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        data = {**dataclasses.asdict(self), "sites": tuple(site.to_dict() for site in self.sites)}
        if not self.places:
            del data["places"]
        return data

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update({"places": {}, **state})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OwnerPlan:
        plain = {
            "calls": dict(data["calls"]),
            "repeats": dict(data["repeats"]),
            "totals": {family: tuple(totals) for family, totals in data["totals"].items()},
            "place": tuple((file, line) for file, line in data["place"]),
            "sites": tuple(SitePlan.from_dict(site) for site in data["sites"]),
            "places": {
                family: {name: Turns(tuple(turns["sites"]), tuple(turns["counts"])) for name, turns in places.items()}
                for family, places in data.get("places", {}).items()
            },
        }
        return cls(**{**data, **plain})


def bias_terms(config: SigmoidConfig) -> tuple[bool, float]:
    """``config.bias`` as (whether -ln n_i is added per row, the number added to every score)."""
    if config.bias == "visible":
        return True, 0.0
    return False, -math.log(config.bias) if isinstance(config.bias, int) else config.bias


class OwnerState(nn.Module):
    """The child module ``sigswap`` of an owner: one :class:`SiteState` per site, and what acts on its output."""

    layer_scale: nn.Parameter | None
    compiled = False  # by compile_attention
    families: frozenset[str] = frozenset()  # of which a call is an attention
    shifted: frozenset[int] = frozenset()  # the sites from whose scores a maximum of the row is subtracted
    # By family: by place, the sites of its turns; and the one site of all its calls. Pickles of 0.1 have none.
    places: dict[str, dict[str, tuple[int, ...]]] = {}  # noqa: RUF012
    only: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, plan: OwnerPlan, config: SigmoidConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.switch = Switch()
        self.plan = plan
        self.calls = dict(plan.calls)
        self.repeats = dict(plan.repeats)
        self.places = {
            family: {name: turns.sites for name, turns in places.items()} for family, places in plan.places.items()
        }
        seen = {family: {site for turns in places.values() for site in turns} for family, places in self.places.items()}
        self.only = {family: min(sites) for family, sites in seen.items() if len(sites) == 1 and min(sites) >= 0}
        self.shifted = frozenset(
            [site for call, site in plan.calls.items() if call.startswith("shift:")]
            + [site for site in seen.get("shift", ()) if site >= 0]
        )
        self.families = frozenset(family for family, sites in seen.items() if max(sites) >= 0)
        # Families in which a missing call would shift the others: there the number of calls has to be a known one.
        targets = {
            family: {i for key, i in plan.calls.items() if key.startswith(f"{family}:")} for family in plan.totals
        }
        self.totals = {family: plan.totals[family] for family in plan.totals if len(targets[family]) > 1}
        self.intercepts_products = bool(config.query_bias) or config.qk_norm is not None
        for index, site in enumerate(plan.sites):
            self.add_module(str(index), SiteState(site, config, plan.path, dtype, device))
        channels = plan.channels
        if (config.layer_scale is not None or config.hybrid_norm) and channels is None:
            raise ConfigError(
                f"{plan.path or 'the model'}: {{argument}} needs an output whose first item is a tensor with a "
                "channel axis, and this module's is not.",
                argument="hybrid_norm" if config.hybrid_norm else "layer_scale",
                hint=Hint("Switch it off for this module with {overrides}.", {"overrides": f"{{{plan.path!r}: ...}}"}),
            )
        self.layer_scale = None
        if config.layer_scale is not None and channels is not None:
            self.layer_scale = nn.Parameter(torch.full((channels,), config.layer_scale, dtype=dtype, device=device))
        self.norm = nn.LayerNorm(channels, dtype=dtype, device=device) if config.hybrid_norm else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        vars(self).setdefault("switch", Switch())  # pickles from before have none

    def site(self, index: int) -> SiteState:
        return self._modules[str(index)]  # type: ignore[return-value]

    def sites(self) -> list[SiteState]:
        return [self.site(index) for index in range(len(self.plan.sites))]

    def other_path(self, what: str) -> UnknownCallError:
        """The error for a forward that does what none did when the model was converted."""
        return UnknownCallError(
            f"{self.plan.path or 'the model'} {what} when it was converted: {_ANOTHER_PATH}", hint=_CONVERT_EACH_PATH
        )

    def check_turns(self, turns: Mapping[tuple[str, str], int]) -> None:
        """Raises UnknownCallError if a forward made a number of turns by which they cannot be told apart."""
        for (family, name), count in turns.items():
            if count not in self.plan.places[family][name].counts:
                known = sorted(self.plan.places[family][name].counts)
                raise self.other_path(f"made {count} {family} calls at {name!r}, and {known}")

    def site_at(self, family: str, position: int) -> int:
        """By a plan of 0.1: the site of the ``position``-th call of ``family``, or NOT_ATTENTION.

        Raises UnknownCallError.
        """
        index = self.calls.get(f"{family}:{position}")
        if index is None:
            index = NOT_ATTENTION if family in ("product", "shift") else self.repeats.get(family)
            if index is not None and family == "softmax":
                index = self._site_of_turn(index)
        if index is None:
            raise self.other_path(f"made its {family} call number {position + 1}, which it did not make")
        return index

    def _site_of_turn(self, index: int) -> int | None:
        """``index``, if the call now made comes from the loop's place in the code; compiled code can't tell."""
        if torch.compiler.is_compiling():
            return None
        place: list[tuple[str, int]] = []
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_name != SWAPPED_FORWARD:
            if place or (frame.f_code.co_name == "__torch_function__"):
                place.append((frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
        # A plan names files without their folders, which differ where it is loaded.
        seen = tuple((os.path.basename(file), line) for file, line in place[1:] if file not in UNSEEN_FILES)
        return index if seen == self.plan.place else None

    def check_totals(self, counts: Mapping[str, int]) -> None:
        """By a plan of 0.1: raises UnknownCallError if a forward made a number of calls by which positions cannot be
        told.
        """
        for family, totals in self.totals.items():
            count = counts.get(family, 0)
            if count not in totals:
                raise self.other_path(f"made {count} {family} calls, and {sorted(totals)}")

    def finish(self, output: Any) -> Any:
        """The owner's output, or the first item of it, after hybrid-norm and LayerScale (paper, section 3)."""
        if self.layer_scale is None and self.norm is None:
            return output
        if isinstance(output, tuple | list):
            items = [self.finish(output[0]), *output[1:]]
            return type(output)(items) if type(output) in (tuple, list) else type(output)(*items)
        axis, channels = self.plan.channel_axis, self.plan.channels
        if output.dim() < -axis or output.shape[axis] != channels:
            raise self.other_path(f"gave an output of shape {list(output.shape)}, which had {channels} channels")
        if self.norm is not None:
            output = self.norm(output.movedim(axis, -1)).movedim(-1, axis)
        if self.layer_scale is not None:
            scale = self.layer_scale.view(-1, *[1] * (-1 - axis))
            output = output * scale.to(output.dtype)
        return output

    def extra_repr(self) -> str:
        scale = "" if self.layer_scale is None else f", layer_scale[{self.layer_scale.numel()}]"
        return f"sites={len(self.plan.sites)}{scale}"


class Terms(TypedDict):
    """Of one site, what is the same for all heads."""

    visible_bias: bool
    const_bias: float
    row_cap: float | None


class RowBias(TypedDict):
    """Of one call, what is not."""

    bias: Tensor | None
    first_token: FirstToken | None


class SiteState(nn.Module):
    """The bias of one site, ``b = b0 + c_h + w_h . q_i`` with ``b0 = const_bias - [ln n_i]``, its QK-norm and
    its row cap.

    With ``first_token`` it is ``b = d_h - logaddexp(s_if, -(a_h b0 + c_h + w_h . q_i))``.
    Parameters: ``bias`` c_h [heads], ``query_weight`` w_h [heads, head_dim], ``length_share`` a_h and ``offset`` d_h
    [heads], ``query_norm.weight`` and ``key_norm.weight`` [heads, head_dim]; each present only if the config asks for
    it.
    """

    bias: nn.Parameter | None
    query_weight: nn.Parameter | None
    length_share: nn.Parameter | None
    offset: nn.Parameter | None
    row_cap: float | None = None  # pickles of 0.1 have none
    fitted_length: int | None = None  # the most visible keys of a row that a calibration saw

    def __init__(
        self, plan: SitePlan, config: SigmoidConfig, path: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.plan = plan
        self.visible_bias, self.const_bias = bias_terms(config)
        self.row_cap = config.row_cap
        self.bias = nn.Parameter(torch.zeros(plan.heads, dtype=dtype, device=device)) if config.learn_bias else None
        self.length_share = self.offset = None
        if config.first_token:
            self.length_share = nn.Parameter(torch.ones(plan.heads, dtype=dtype, device=device))
            self.offset = nn.Parameter(torch.zeros(plan.heads, dtype=dtype, device=device))
        self.acts_on_product = bool(config.query_bias) or config.qk_norm is not None
        self.query_weight = None
        self.query_norm: HeadNorm | None = None
        self.key_norm: HeadNorm | None = None
        if not config.query_bias and config.qk_norm is None:
            return
        leave_out = Hint(
            "Leave it out, or switch it off for this module with {overrides}.", {"overrides": f"{{{path!r}: ...}}"}
        )
        if plan.head_dim is None or (plan.kind == "softmax" and plan.product is None):
            raise ConfigError(
                f"{path or 'the model'}: {{argument}} needs the one product of query and key that makes the scores, "
                "and here they are a sum of several or not a matmul, bmm, baddbmm or einsum.",
                argument="query_bias" if config.query_bias else "qk_norm",
                hint=leave_out,
            )
        product = plan.product
        if config.query_bias and product is not None and not product.rows_in_order and product.row_order is None:
            raise ConfigError(
                f"{path or 'the model'}: {{argument}} cannot follow the queries from their product to the softmax.",
                argument="query_bias",
                hint=leave_out,
            )
        if config.query_bias:
            self.query_weight = nn.Parameter(torch.zeros(plan.heads, plan.head_dim, dtype=dtype, device=device))
        if config.qk_norm is not None:
            self.query_norm = HeadNorm(config.qk_norm, plan.heads, plan.head_dim, dtype, device)
            self.key_norm = HeadNorm(config.qk_norm, plan.key_heads, plan.head_dim, dtype, device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles from before first_token lack its two.
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in ("length_share", "offset"):
            if name not in self._parameters:
                vars(self).setdefault(name, None)

    def fits(self, scores: Tensor, dim: int) -> bool:
        """Whether a softmax over ``dim`` of ``scores`` can be this site's: their axes are those of the ones seen."""
        return self.plan.scores == (scores.dim(), dim - scores.dim())

    @property
    def product(self) -> ProductPlan:
        """The product of a site that computes its own scores, and of which it is known."""
        if self.plan.product is None:  # an AttributeError: tools ask every attribute with hasattr
            raise AttributeError(f"{self.plan.kind} has no product")
        return self.plan.product

    def check_length(self, rows: int) -> None:
        """Warns where a call has many more query rows than calibration saw keys. Compiled code does not look.

        Rows, not keys: a static cache has more keys than any row sees.
        """
        if self.fitted_length is None or torch.compiler.is_compiling() or rows <= FAR * self.fitted_length:
            return
        warnings.warn(
            f"a model whose attention was calibrated on at most {self.fitted_length} visible keys runs on {rows} "
            "positions: its bias was not fitted for such a length. Calibrate it with a few inputs of that length.",
            stacklevel=2,
        )

    def check_heads(self, query: Tensor, mask: Tensor | None, is_causal: bool) -> None:
        """Raises UnknownCallError for fewer heads than were converted, by the arguments of
        scaled_dot_product_attention: those of several tokens, as a causal flag or a mask shows, are not packed.
        """
        axis, values = self.plan.sdpa_head_axis, self._per_head()
        if axis.axis is None or axis.merged or values is None:
            return
        size, heads = query.shape[axis.axis], of_this_rank(values, query).shape[0]
        tokens = query.shape[-2] if is_causal else mask.shape[-2] if mask is not None and mask.dim() > 1 else 1
        if size < heads and tokens > 1 and (mask is None or mask.dim() < 3 or mask.shape[-3] == 1):
            raise axis.other_heads(heads, size)

    def shard(self, query: Tensor) -> int:
        """The number of this rank among those that have other heads, 0 for the first; where ``query`` does not know of
        the others, and no parameter per head does, 0."""
        values: Any = self._per_head()
        return (
            0 if values is None or of_this_rank(values, query) is values else int(values.device_mesh.get_local_rank())
        )

    def _per_head(self) -> Tensor | None:
        norm = None if self.query_norm is None else self.query_norm.weight
        return next((each for each in (self.bias, self.query_weight, norm) if each is not None), None)

    def sdpa_bias(self, query: Tensor) -> RowBias:
        """The bias of the rows of a query [..., M, D], to be added to scores [..., M, N]."""
        self.check_length(query.shape[-2])
        return self._bias_of_query(query, self.plan.sdpa_head_axis)

    def bias_of_heads(self, query: Tensor) -> RowBias:
        """The same for a query [B, H, M, D], wherever the site's own has its heads."""
        return self._bias_of_query(query, SDPA_HEADS)

    def _bias_of_query(self, query: Tensor, head_axis: HeadAxis) -> RowBias:
        def spread(values: Tensor | None, dim_axis: int | None = None) -> Tensor | None:
            if values is None:
                return None
            return head_axis.spread(values, query, dim_axis=dim_axis, unmerged="pack")

        weight, projected = spread(self.query_weight, -1), None
        if weight is not None:
            projected = (query * weight).sum(-1, keepdim=True)
        return self._row_bias(spread, projected)

    def _row_bias(self, spread: Callable[[Tensor | None], Tensor | None], projected: Tensor | None) -> RowBias:
        """``spread``: shapes a value per head to broadcast over the scores. ``projected``: w_h . q_i, so shaped."""
        bias = spread(self.bias)
        bias = projected if bias is None else bias if projected is None else bias + projected
        share, first = spread(self.length_share), None
        if share is not None:
            bias, first = spread(self.offset), FirstToken(share, bias)
        return RowBias(bias=bias, first_token=first)

    def normalized(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Query [..., H, M, D] and key [..., Hk, N, D] after QK-norm."""
        if self.query_norm is None or self.key_norm is None:
            return query, key
        axes = AxisPlan(-1, self.plan.sdpa_head_axis)
        return self.query_norm(query, axes, "pack"), self.key_norm(key, axes, "group")

    @property
    def terms(self) -> Terms:
        """What is the same for all heads, for the functions of :mod:`sigswap.functional`."""
        return {"visible_bias": self.visible_bias, "const_bias": self.const_bias, "row_cap": self.row_cap}

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, **arguments: Unpack[AttentionArguments]
    ) -> tuple[Tensor, Tensor | None]:
        """This site's attention as :class:`sigswap.functional.multi_head.Attention` describes it."""
        query, key = self.normalized(query, key)
        return sigmoid_heads(query, key, value, **arguments, **self.sdpa_bias(query), **self.terms)

    def row_bias(self, scores: Tensor, key_axis: int, query_bias: Tensor | None) -> RowBias:
        """The bias of the rows of ``scores``, with size 1 at ``key_axis``. ``query_bias``: w_h . q_i, if there is."""
        if self.plan.row_axis is not None:
            self.check_length(scores.shape[self.plan.row_axis])
        if query_bias is not None:
            rows = list(scores.shape)
            rows[key_axis] = 1
            query_bias = query_bias.reshape(rows)

        def spread(values: Tensor | None) -> Tensor | None:
            return None if values is None else self.plan.head_axis.spread(values, scores)

        return self._row_bias(spread, query_bias)

    def transformed_factors(
        self, query: Tensor, key: Tensor, plan: ProductPlan
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Query and key of a product after QK-norm, and w_h . q_i for its rows (or None)."""
        query_bias = None
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query, plan.query, "exact"), self.key_norm(key, plan.key, "group")
        if self.query_weight is not None:
            weight = plan.query.head_axis.spread(self.query_weight, query, dim_axis=plan.query.dim_axis)
            # w_h acts on the query itself, not on what the module has already multiplied by the scale.
            query_bias = plan.ordered((query * weight).sum(plan.query.dim_axis) / plan.query.scale)
        return query, key, query_bias

    def extra_repr(self) -> str:
        bias = "-ln(visible keys)" if self.visible_bias else f"{self.const_bias:.4g}"
        first = "" if self.length_share is None else ", first token"
        cap = "" if self.row_cap is None else f", row_cap={self.row_cap:.4g}"
        return f"{self.plan.kind}, heads={self.plan.heads}, bias={bias}{first}{cap}"


class HeadNorm(nn.Module):
    """RMSNorm or LayerNorm over head_dim in float32, with a weight [heads, head_dim] and no bias."""

    def __init__(self, kind: str, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(heads, head_dim, dtype=dtype, device=device))

    def forward(self, x: Tensor, axes: AxisPlan, unmerged: Unmerged) -> Tensor:
        weight = axes.head_axis.spread(self.weight, x, dim_axis=axes.dim_axis, unmerged=unmerged)
        moved = x.movedim(axes.dim_axis, -1)
        norm = F.rms_norm if self.kind == "rms" else F.layer_norm
        wide = moved if x.dtype == torch.float64 else moved.float()
        normed = norm(wide, moved.shape[-1:], eps=torch.finfo(torch.float32).eps).movedim(-1, axes.dim_axis)
        return (normed * weight).to(x.dtype) * axes.scale

    def extra_repr(self) -> str:
        return f"{self.kind}, weight={list(self.weight.shape)}"
