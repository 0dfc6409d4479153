"""A transformers model whose softmax attention was replaced by sigmoid attention, by sigswap.

``sigswap.save(model, directory, remote_code=True)`` wrote this file, and transformers runs it where
``trust_remote_code=True`` asks for that. Where the package sigswap is installed, sigswap loads the model. Where it is
not, the model computes the same in plain PyTorch, as defined here, slower and with all scores in memory. Of row i of a
head, which sees n_i keys::

    s_ij = scale * q_i . k_j, then the additive mask, if the model has one
    b_i  = b0 + c + w . q_i       b0 = -ln(n_i), or one number
    or, with the first token: b_i = d - logaddexp(s_if, -(a b0 + c + w . q_i)), f the first key that i sees
    p_ij = sigmoid(s_ij + b_i), exactly 0 where masked; then dropout
    o_i  = sum over j of p_ij v_j, divided by max(row_cap, sum over j of p_ij), if there is a row cap

Only calls of ``F.scaled_dot_product_attention`` are replaced so; a module that attends in another way is an error. What
was converted, and how, is in config.json; the parameters are under ``<module>.sigswap.*``.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

INSTALL = "Install the package sigswap (pip install sigswap), and load the model again."
ATTENTION = "sigswap (pip install sigswap, and import it before; or pass trust_remote_code=True)"
MARKS = ("quantization_config", "attn_implementation", "transformers_weights")
MISSING = "SIGMOID-ATTENTION-MODEL-do-import-sigswap-or-pass-trust_remote_code.safetensors"
MASKED_SCORE = -5000.0
HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
SOFTMAX = (F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax)
logger = logging.get_logger("transformers.sigswap")


def is_installed() -> bool:
    try:
        importlib.import_module("sigswap")
    except ModuleNotFoundError as error:
        if error.name != "sigswap":
            raise
        return False
    return True


class SigmoidAttention:
    """Stands before a class of transformers, whose models then have sigmoid attention, by the marks in config.json."""

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config, parent = without_marks(config), cast(Any, super())
        parent.__init__(config, *args, **kwargs)
        install(self, config.sigswap["conversion"])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        if is_installed():
            return original(cls).from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if kwargs.get("quantization_config") is not None:
            raise ImportError(f"To quantize a model with sigmoid attention takes sigswap. {INSTALL}")
        config = kwargs.pop("config", None)
        if not hasattr(config, "to_dict"):  # it is the name of a directory, or none
            hub = {name: kwargs[name] for name in HUB if name in kwargs}
            config, others = parent.config_class.from_pretrained(
                config or pretrained_model_name_or_path, return_unused_kwargs=True, **kwargs
            )
            kwargs = {**hub, **others}
        asked, told = kwargs.pop("attn_implementation", None), kwargs.pop("output_loading_info", False)
        if asked not in (None, "sdpa"):
            logger.warning(f"attn_implementation={asked!r} cannot run sigmoid attention here; 'sdpa' is used.")
        model, info = parent.from_pretrained(
            pretrained_model_name_or_path,
            *args,
            config=without_marks(config),
            output_loading_info=True,
            **kwargs,
        )
        absent = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        absent = {name for name in absent if ".sigswap." in f".{name}"}
        if absent:
            raise OSError(f"The weights in {pretrained_model_name_or_path} lack those of sigswap: {sorted(absent)[:5]}")
        logger.warning(
            "sigswap is not installed: the sigmoid attention of this model runs in plain PyTorch, right but slow. "
            "pip install sigswap brings its kernels."
        )
        return (model, info) if told else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        if is_installed():
            return original(cls)._from_config(config, **kwargs)
        kwargs.pop("attn_implementation", None)
        parent: Any = super()
        return parent._from_config(without_marks(config), **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        # By this transformers decides whether names in the weights are renamed as for its own class, which they are.
        return False

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the marks in config.json that say what the attention is."""
        config, parent = self.config, cast(Any, super())
        fields = vars(config)

        def to_json_file(path: Any, *others: Any, **options: Any) -> None:
            del fields["to_json_file"]  # else it would be serialized
            config.to_json_file(path, *others, **options)
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            entry = data.pop("sigswap")
            entry = {name: value for name, value in entry.items() if name not in ("config_checksums", "weights")}
            data |= dict(zip(MARKS, (entry, ATTENTION, MISSING), strict=True))
            Path(path).write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")

        fields["to_json_file"] = to_json_file
        try:
            return parent.save_pretrained(*args, **kwargs)
        finally:
            fields.pop("to_json_file", None)


def original(cls: type) -> Any:
    """The class of transformers that ``cls`` comes from."""
    return next(parent for parent in cls.__mro__ if parent.__module__.startswith("transformers."))


def without_marks(config: Any) -> Any:
    """A copy of ``config`` of which transformers makes a model, with the entry of its marks as ``sigswap``."""
    if hasattr(config, "sigswap"):
        return config
    entry = getattr(config, "quantization_config", None)
    if not isinstance(entry, dict) or "conversion" not in entry:
        raise ValueError(
            "The config does not say how the model was converted. Pass none, or the one that AutoConfig returns for "
            "the model's own directory."
        )
    if "quantized" in entry:
        raise ImportError(f"The model is quantized, and has sigmoid attention: that takes sigswap. {INSTALL}")
    config = copy.deepcopy(config)
    for name in MARKS:
        vars(config).pop(name, None)
    config.sigswap = entry
    for path, part in parts(config):
        part._attn_implementation_internal = entry["attn_implementation"].get(path)
    return config


def parts(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """``config`` and those inside it, each with its dotted path."""
    yield path, config
    for name in type(config).sub_configs:
        part = getattr(config, name, None)
        if hasattr(part, "_attn_implementation"):
            yield from parts(part, f"{path}.{name}" if path else name)


def install(model: Any, conversion: Mapping[str, Any]) -> None:
    """Gives the modules that were converted their parameters, and the class that attends by them."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    paths = [owner["path"] for owner in conversion["owners"]]
    renamed: dict[str, str] = {path: path for path in paths}
    if not modules.keys() >= renamed.keys():  # the model has another head than the one that was saved
        renamed = {path: prefix + path for path in paths}
        if not modules.keys() >= set(renamed.values()):
            renamed = {path: path.removeprefix(prefix) for path in paths}
    here = [owner for owner in conversion["owners"] if renamed[owner["path"]] in modules]
    if not here:
        raise ImportError(f"{type(model).__name__} has none of the modules that were converted. {INSTALL}")
    for plan in here:
        owner = modules[renamed[plan["path"]]]
        options = {name: value for name, value in conversion["config"].items() if name != "overrides"}
        for pattern, fields in conversion["config"].get("overrides", {}).items():
            if fnmatch.fnmatchcase(plan["path"], pattern):
                options |= fields
        owner.add_module("sigswap", Owner(plan, options))
        owner.__class__ = attending(type(owner))


class Owner(nn.Module):
    """The child ``sigswap`` of a module that attends: what acts on its attention, "0", and on its output."""

    def __init__(self, plan: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.path, self.channel_axis, self.may_skip = plan["path"], plan["channel_axis"], plan["may_skip"]
        self.add_module("0", Site(plan["sites"][0], options))
        scaled, channels = options.get("layer_scale"), plan["channels"]
        self.layer_scale = None if scaled is None else nn.Parameter(torch.full((channels,), float(scaled)))
        self.norm = nn.LayerNorm(channels) if options.get("hybrid_norm") else None

    def finish(self, output: Any) -> Any:
        if isinstance(output, (tuple, list)):
            items = [self.finish(output[0]), *output[1:]]
            return type(output)(items) if type(output) in (tuple, list) else type(output)(*items)
        if self.norm is not None:
            output = self.norm(output.movedim(self.channel_axis, -1)).movedim(-1, self.channel_axis)
        if self.layer_scale is not None:
            output = output * self.layer_scale.view(-1, *[1] * (-1 - self.channel_axis)).to(output.dtype)
        return output


class Site(nn.Module):
    """One attention: ``bias`` c, ``query_weight`` w, ``length_share`` a, ``offset`` d, and QK-norm."""

    def __init__(self, plan: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads, self.key_heads = plan["heads"], plan["key_heads"]
        bias = options.get("bias", "visible")
        self.visible_bias = bias == "visible"
        self.const_bias = 0.0 if self.visible_bias else -math.log(bias) if isinstance(bias, int) else bias
        self.row_cap, first, norm = options.get("row_cap"), options.get("first_token"), options.get("qk_norm")

        def parameter(used: Any, start: float, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.full(shape, start)) if used else None

        self.bias = parameter(options.get("learn_bias", True), 0.0, self.heads)
        self.length_share = parameter(first, 1.0, self.heads)
        self.offset = parameter(first, 0.0, self.heads)
        self.query_weight = parameter(options.get("query_bias"), 0.0, self.heads, plan["head_dim"])
        self.query_norm = HeadNorm(norm, self.heads, plan["head_dim"]) if norm else None
        self.key_norm = HeadNorm(norm, self.key_heads, plan["head_dim"]) if norm else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As ``F.scaled_dot_product_attention``: [B, H, M, D], [B, Hk, N, D] and [B, Hk, N, Dv] to [B, H, M, Dv].

        For one query per sequence also [B, Hk, H / Hk, D] and [B, Hk, N, D], as transformers packs grouped heads.
        """
        if self.query_norm is not None and self.key_norm is not None:
            query = self.query_norm(query, self.laid(self.query_norm.weight, query))
            shared = key.shape[-3] // self.key_heads
            key = self.key_norm(key, self.key_norm.weight.repeat_interleave(shared, 0)[:, None])
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        with torch.autocast(query.device.type, enabled=False):
            q = query.to(wide) * (query.shape[-1] ** -0.5 if scale is None else scale)
            scores = q @ key.to(wide).transpose(-1, -2)
            seen = torch.ones(1, scores.shape[-1], dtype=torch.bool, device=scores.device)
            if is_causal:
                seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            if attn_mask is not None and attn_mask.dtype != torch.bool:
                added = attn_mask.to(wide)
                scores, attn_mask = scores + added, ~(added <= MASKED_SCORE)
            if attn_mask is not None:
                seen = attn_mask & seen
            p = torch.sigmoid(scores + self.row_bias(query, scores, seen)).masked_fill(~seen, 0.0)
            out = F.dropout(p, dropout_p) @ value.to(wide)
            if self.row_cap is not None:
                out = out / p.sum(-1, keepdim=True).clamp(min=self.row_cap)
        return out.to(query.dtype)

    def row_bias(self, query: Tensor, scores: Tensor, seen: Tensor) -> Tensor:
        """b of each row, [.., M, 1], in the dtype of the scores."""
        start = torch.full((1, 1), self.const_bias, dtype=scores.dtype, device=scores.device)
        if self.visible_bias:
            start = start - seen.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype).log()
        terms = torch.zeros((1, 1), dtype=scores.dtype, device=scores.device)
        if self.bias is not None:
            terms = terms + self.laid(self.bias, query).to(scores.dtype)
        if self.query_weight is not None:
            terms = terms + (query * self.laid(self.query_weight, query)).sum(-1, keepdim=True).to(scores.dtype)
        if self.length_share is None or self.offset is None:
            return start + terms
        first = seen.to(torch.uint8).argmax(-1, keepdim=True).expand(*scores.shape[:-1], 1)
        others = self.laid(self.length_share, query).to(scores.dtype) * -start - terms
        rest = torch.logaddexp(scores.gather(-1, first), others)
        return self.laid(self.offset, query).to(scores.dtype) - rest

    def laid(self, values: Tensor, query: Tensor) -> Tensor:
        """``values`` [H] or [H, D] as [H, 1, 1 or D], or as transformers packs the query."""
        groups, rows = query.shape[-3], query.shape[-2]
        if groups == self.heads:
            rows = 1
        elif groups * rows != self.heads:
            raise ValueError(f"an attention that had {self.heads} heads when it was converted has {groups} now")
        return values.reshape(groups, rows, -1)


class HeadNorm(nn.Module):
    """RMSNorm or LayerNorm over head_dim in float32, with a weight per head."""

    def __init__(self, kind: str, heads: int, head_dim: int) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(heads, head_dim))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        norm = F.rms_norm if self.kind == "rms" else F.layer_norm
        return (norm(wide, x.shape[-1:], eps=torch.finfo(torch.float32).eps) * weight).to(x.dtype)


class Swap(TorchFunctionMode):
    """While it is active, ``F.scaled_dot_product_attention`` is that of ``state``. Notes whether it was called, and
    whether a softmax was."""

    def __init__(self, state: Owner) -> None:
        super().__init__()
        self.site, self.swapped, self.softmax = state._modules["0"], False, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.swapped = True
            assert self.site is not None
            return self.site(*args, **(kwargs or {}))
        self.softmax = self.softmax or func in SOFTMAX
        return func(*args, **(kwargs or {}))


def implementation(owner: Any) -> Any:
    """The attention implementation that the config of ``owner`` names, if it has one."""
    return getattr(getattr(owner, "config", None), "_attn_implementation", None)


ATTENDING: dict[type, type] = {}


def attending(base: type) -> type:
    """The subclass of ``base``, with its name, whose forward runs under :class:`Swap`."""
    if base not in ATTENDING:
        run: Callable[..., Any] = base.forward  # type: ignore[attr-defined]

        @functools.wraps(run)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            mode = Swap(self.sigswap)
            with mode:
                output = run(self, *args, **kwargs)
            # A forward that may attend nothing does not need to: but by softmax it may not either.
            skipped = self.sigswap.may_skip and not mode.softmax and implementation(self) in (None, "sdpa")
            if not mode.swapped and not skipped:
                raise RuntimeError(
                    f"{self.sigswap.path} attended without F.scaled_dot_product_attention, by softmax (was the "
                    f"attention implementation of the model changed?). {INSTALL}"
                )
            return self.sigswap.finish(output)

        names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
        ATTENDING[base] = type(base.__name__, (base,), {**names, "forward": forward})
    return ATTENDING[base]
