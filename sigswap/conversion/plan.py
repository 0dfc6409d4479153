"""From recorded runs to a plan: which module owns each site, and by which of its calls the site is addressed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from sigswap.conversion.head_axis import HeadAxis
from sigswap.conversion.places import name_of
from sigswap.conversion.recording import Run
from sigswap.conversion.state import NOT_ATTENTION, AxisPlan, OwnerPlan, ProductPlan, SitePlan, Turns
from sigswap.conversion.watch import Call, Stack
from sigswap.functional.torch_functions import NOT_IN_EVERY_PLAN
from sigswap.passes.site import AttentionSite, Factor, Product

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
AMBIGUOUS = "one expression in its code is an attention in one forward and none, or another one, in the next"


@dataclasses.dataclass(frozen=True)
class Left:
    """A softmax that stays: where, why, and whether it is an attention."""

    path: str
    kind: str
    reason: str
    attention: bool


@dataclasses.dataclass(frozen=True)
class Sites:
    """What one run (or several, merged) has to say about a model: plans by owner path, and what is left."""

    owners: Mapping[str, OwnerPlan]
    left: tuple[Left, ...]
    guarded: frozenset[str]


def plan_run(model: nn.Module, run: Run, wanted: Iterable[str] | None = None, known: Iterable[str] = ()) -> Sites:
    """The plan that ``run`` of ``model`` shows. ``wanted``: owner paths to plan for (None: all).

    ``known``: paths that own a site in other runs; their calls in this one are planned also where they own none.
    """
    owned, left = _owned_sites(model, run)
    if wanted is not None:
        wanted = set(wanted)
        owned = {call: item for call, item in owned.items() if item[0][0] in wanted}
    owners: dict[str, OwnerPlan] = {}
    paths = dict.fromkeys(owner for (owner, _), _ in owned.values())
    for path in dict.fromkeys([*paths, *(path for path in known if path in run.executed)]):
        plan = _owner_plan(model, run, path, owned)
        if plan is None:
            left.append(Left(path, "softmax", AMBIGUOUS, True))
        else:
            owners[path] = plan
    guarded = {
        path
        for call in owned
        for path, _ in run.calls[call].stack
        if isinstance(_module(model, path), _FAST_PATHS) and path not in owners
    }
    return Sites(owners, tuple(left), frozenset(guarded))


def merge(first: Sites, other: Sites) -> tuple[Sites, list[str]]:
    """``first`` with the calls that only ``other`` saw, and the paths whose calls contradict one another.

    Owners that only ``other`` has are added: another input reached them.
    """
    owners, clashes = dict(first.owners), []
    for path, plan in other.owners.items():
        known = owners.get(path)
        merged = plan if known is None else _merged_owner(known, plan)
        if merged is None:
            clashes.append(path)
        else:
            owners[path] = merged
    left = tuple(dict.fromkeys((*first.left, *other.left)))
    return Sites(owners, left, first.guarded | other.guarded), clashes


def without(sites: Sites, path: str, reason: str) -> Sites:
    """``sites`` without the owner ``path``, which is left as an attention for ``reason``."""
    owners = {other: plan for other, plan in sites.owners.items() if other != path}
    return dataclasses.replace(sites, owners=owners, left=(*sites.left, Left(path, "softmax", reason, True)))


def _merged_owner(known: OwnerPlan, plan: OwnerPlan) -> OwnerPlan | None:
    """One plan of two runs; None if they contradict one another."""
    if known.sites and plan.sites and len(plan.sites) != len(known.sites):
        return None
    seen: dict[str, dict[str, list[tuple[int, ...]]]] = {}
    for one in (known, plan):
        for family, places in one.places.items():
            for name, turns in places.items():
                seen.setdefault(family, {}).setdefault(name, []).extend(turns.forwards())
    sites = known.sites or plan.sites
    if known.sites and plan.sites:
        sites = tuple(_merged_site(a, b) for a, b in zip(known.sites, plan.sites, strict=True))
    return _with_places(dataclasses.replace(known, sites=sites, may_skip=known.may_skip or plan.may_skip), seen)


def _with_places(plan: OwnerPlan, seen: Mapping[str, Mapping[str, list[tuple[int, ...]]]]) -> OwnerPlan | None:
    """``plan`` with the turns that were seen in forwards of the owner, by family and place; None if they contradict.

    Products that do are left out, and a site of theirs counts as one whose product is not known.
    """
    places: dict[str, dict[str, Turns]] = {}
    sites = list(plan.sites)
    for family, by_name in seen.items():
        for name, forwards in by_name.items():
            turns = Turns.of(forwards)
            if turns is not None:
                places.setdefault(family, {})[name] = turns
            elif family != "product":
                return None
            else:
                for site in {*itertools.chain(*forwards)} - {NOT_ATTENTION}:
                    sites[site] = dataclasses.replace(sites[site], product=None)
    return dataclasses.replace(plan, sites=tuple(sites), places=places)


def _merged_site(known: SitePlan, other: SitePlan) -> SitePlan:
    """``known``, with the layout of whatever only ``other`` does: computing its own scores, or calling sdpa."""
    if known.kind != "softmax" and other.kind == "softmax":
        same = ("head_axis", "row_axis", "product", "scores", "extra", "weighted", "undivided")
        return dataclasses.replace(known, **{name: getattr(other, name) for name in same})
    if known.kind == "softmax" and other.kind == "sdpa":
        return dataclasses.replace(known, sdpa_head_axis=other.sdpa_head_axis)
    return known


def _module(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path)


def _owned_sites(model: nn.Module, run: Run) -> tuple[dict[int, tuple[tuple[str, int], AttentionSite]], list[Left]]:
    """For the index of each call that is to be swapped: its owner (path and module call) and its site."""
    owned: dict[int, tuple[tuple[str, int], AttentionSite]] = {}
    left: list[Left] = []
    for site in run.found.sites:
        stack = run.stack_of(site.anchor)
        call = run.call_of(site.exponential or site.anchor)
        if call is not None and run.calls[call].family not in ("softmax", "sdpa", "mha", *NOT_IN_EVERY_PLAN):
            call = None
        in_function = call is not None and run.calls[call].in_function
        if call is None or in_function:
            reason = "its softmax is not called through torch, torch.nn.functional or Tensor (scripted code, say)"
            if in_function:
                reason = "its softmax runs inside an autograd.Function, whose backward is the softmax's"
            left.append(Left(stack[-1][0], site.kind, reason, True))
            continue
        outer = run.calls[call].mha
        if outer is not None:
            call, stack = outer, run.calls[outer].stack
        else:
            stack = _common(stack, *(run.stack_of(p.node) for p in site.products[:1]), run.stack_of(site.output))
        owner = next((entry for entry in reversed(stack) if not _is_container(_module(model, entry[0]))), None)
        if owner is None:
            reason = f"its query, softmax and value meet in a plain {type(model).__name__}; put them into a module"
            left.append(Left(stack[-1][0], site.kind, reason, True))
        elif site.exponential not in (None, site.anchor) and not _divides_next(
            run, call, site.inverse or site.anchor, owner
        ):
            reason = (
                "its softmax is written by hand, and another division comes between its exp and its own; call softmax"
            )
            left.append(Left(stack[-1][0], site.kind, reason, True))
        elif not all(_is_shift_in(run, node, owner) for node in site.shifts):
            reason = "its scores are shifted by a reduction over their own row, which cannot be taken out"
            left.append(Left(stack[-1][0], site.kind, reason, True))
        else:
            owned[call] = (owner, site)
    for item in run.found.left_alone:
        call = run.call_of(item.anchor)
        kind = "softmax" if call is None else run.calls[call].family
        left.append(Left(run.stack_of(item.anchor)[-1][0], kind, item.reason, item.attention))
    reason = "its softmax runs in a thread that the forward hands work to, where the swap does not reach"
    left += [Left(path, family, reason, True) for path, family in run.elsewhere]
    return owned, list(dict.fromkeys(left))


def _divides_next(run: Run, exponential: int, division: Node, owner: tuple[str, int]) -> bool:
    """Whether the call of an exp within that call of the owner is followed by that of ``division`` before any other."""
    after = (i for i, call in enumerate(run.calls) if i > exponential and call.family == "division")
    following = next((i for i in after if owner in run.calls[i].stack), None)
    call = run.calls[exponential]
    return call.family == "exp" and owner in call.stack and following is not None and following == run.call_of(division)


def _is_shift_in(run: Run, node: Node, owner: tuple[str, int]) -> bool:
    """Whether a call of that family made ``node`` within that call of the owner, whose mode sees it then."""
    call = run.call_of(node)
    return call is not None and run.calls[call].family == "shift" and owner in run.calls[call].stack


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, _CONTAINERS) and any(type(module).forward is cls.forward for cls in _CONTAINERS)


def _common(*stacks: Stack) -> Stack:
    common = stacks[0]
    for stack in stacks[1:]:
        length = 0
        while length < min(len(common), len(stack)) and common[length] == stack[length]:
            length += 1
        common = common[:length]
    return common


def _owner_plan(
    model: nn.Module,
    run: Run,
    path: str,
    owned: Mapping[int, tuple[tuple[str, int], AttentionSite]],
) -> OwnerPlan | None:
    """The plan of the owner at ``path``; None if a call of it cannot be told from others."""
    index_of: dict[Any, int] = {}  # place in the owner's code -> site
    sites: list[SitePlan] = []
    seen: dict[tuple[str, str, int], list[int]] = {}  # family, place and module call of the owner -> sites, by turn
    helper_sites: dict[int, int] = {}  # index of a product's or a row shift's call -> site
    attended: set[int] = set()  # the owner's module calls in which it attended

    for anchor, ((owner, _), site) in owned.items():
        if owner != path:
            continue
        place = _lines(run.calls[anchor], path)
        if place not in index_of:
            index_of[place] = len(sites)
            sites.append(_site_plan(run, anchor, site))
        if len(site.products) == 1:
            product_call = run.call_of(site.products[0].node)
            if product_call is not None and run.calls[product_call].family == "product":
                helper_sites[product_call] = index_of[place]
        for node in site.shifts:
            helper_sites[run.call_of(node)] = index_of[place]  # type: ignore[index]

    families = {run.calls[anchor].family for anchor, ((owner, _), _) in owned.items() if owner == path}
    for index, call in enumerate(run.calls):
        depth = _depth(call, path)
        if depth is None:
            continue
        if call.mha is not None:
            continue  # within multi_head_attention_forward, which is addressed as a whole
        call_owner = owned[index][0][0] if index in owned else None
        if call_owner is not None and call_owner != path and (_depth(call, call_owner) or 0) > depth:
            continue  # swapped by an owner further in: this one never sees it
        if call.family == "division" or (call.family in NOT_IN_EVERY_PLAN and call.family not in families):
            continue
        if call.family in ("product", "shift"):
            target = helper_sites.get(index, NOT_ATTENTION)
        else:
            target = index_of[_lines(call, path)] if call_owner == path else NOT_ATTENTION
        invocation = call.stack[depth][1]
        name = name_of(itertools.chain(*call.spots[: len(call.stack) - depth]))
        seen.setdefault((call.family, name, invocation), []).append(target)
        if call.family not in ("product", "shift") and target >= 0:
            attended.add(invocation)

    forwards: dict[str, dict[str, list[tuple[int, ...]]]] = {}
    for (family, name, _), turns in seen.items():
        forwards.setdefault(family, {}).setdefault(name, []).append(tuple(turns))
    axis, channels = _channels(_module(model, path), run.outputs.get(path))
    may_skip = any(invocation not in attended for invocation in run.executed.get(path, ()))
    return _with_places(
        OwnerPlan(path, tuple(sites), channel_axis=axis, channels=channels, may_skip=may_skip), forwards
    )


def _depth(call: Call, path: str) -> int | None:
    """Where in the call's stack the module ``path`` is, or None."""
    return next((i for i in range(len(call.stack) - 1, -1, -1) if call.stack[i][0] == path), None)


def _lines(call: Call, path: str) -> Any:
    """The modules and expressions in the owner that led to the call. They make it a site; a loop's turns share them."""
    below = len(call.stack) - 1 - (_depth(call, path) or 0)
    inner = tuple(name for name, _ in call.stack[len(call.stack) - below :])
    return inner, tuple(
        tuple((spot.code.co_filename, spot.positions) for spot in level) for level in call.spots[: below + 1]
    )


def _site_plan(run: Run, call: int, site: AttentionSite) -> SitePlan:
    heads = run.calls[call].heads
    if heads is not None:
        return SitePlan("multi_head_attention", heads[0], heads[0], heads[1], mask=site.mask)
    rank = site.key_axis + 1 if site.kind == "sdpa" else site.anchor.meta["val"].dim()
    product = None
    if len(site.products) == 1 and site.products[0].query.head.heads and site.products[0].key.head.heads:
        product_call = run.call_of(site.products[0].node)
        if product_call is not None and run.calls[product_call].family == "product":
            product = _product_plan(site.products[0])
    plan = SitePlan(
        kind=site.kind,
        heads=site.head.heads,
        key_heads=site.key_heads or site.head.heads,
        head_dim=site.head_dim,
        mask=site.mask,
        product=product,
    )
    head_axis = HeadAxis.of(site.head, rank)
    if site.kind == "sdpa":
        return dataclasses.replace(plan, sdpa_head_axis=head_axis)
    return dataclasses.replace(
        plan,
        head_axis=head_axis,
        row_axis=None if site.row_axis is None else site.row_axis - rank,
        scores=(rank, site.key_axis - rank),
        extra=site.extra,
        weighted=site.weighted,
        undivided=site.exponential is not None and site.exponential is site.anchor,
    )


def _product_plan(product: Product) -> ProductPlan:
    def axes(factor: Factor) -> AxisPlan:
        rank = factor.node.meta["val"].dim()
        return AxisPlan(factor.dim_axis - rank, HeadAxis.of(factor.head, rank), factor.scale)

    query, key, order = product.query, product.key, product.row_order
    in_order = order == tuple(range(len(order or ())))
    return ProductPlan(
        query.position, key.position, axes(query), axes(key), in_order, row_order=None if in_order else order
    )


def _channels(owner: nn.Module, output: Tensor | None) -> tuple[int, int | None]:
    """The channel axis of the owner's output, from the end, and its size; None if the output has none."""
    if output is None or output.dim() < 2:
        return -1, None
    convolutional = output.dim() == 4 and any(isinstance(module, nn.Conv2d) for module in owner.modules())
    axis = -3 if convolutional else -1
    return axis, int(output.shape[axis])
