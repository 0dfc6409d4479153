"""Small configs of transformers' model types, made from their own defaults by the names of their fields.

All widths become one number, so that parts of a model fit one another; where that breaks a rule of the architecture's
(rotary sections, head_dim), :func:`scaled` divides widths and numbers of heads by one factor instead.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any

VOCABULARY = 160
WIDTH, HEADS, KEY_HEADS, HEAD_DIM, INNER, LAYERS, POSITIONS = 32, 4, 2, 8, 64, 2, 128
FIRST_SPECIAL = 100
"""Ids of special tokens that lie beyond the vocabulary become numbers from here on."""

_HEADS = r"(^|_)(num_attention_heads|num_heads|n_heads?|attention_heads|heads|num_attn_heads|nhead)$"
_KEY_HEADS = r"(key_value_heads|kv_heads|num_kv|multi_query_group_num|num_query_groups)$"
_WIDTH = (
    r"(^|_)(hidden_size|d_model|n_embd|dim|embed_dim|hidden_dim|embedding_size|embedding_dim|projection_dim|width"
    r"|proj_size|proj_dim|emb_dim|hidden_channels|feature_size|fusion_hidden_size|d_embed|out_dim|output_dim"
    r"|hidden_states|embed_size|input_dim|inner_dim|attention_size|output_size|lm_embed_dim|dims?)$"
)
_INNER = (
    r"(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|inner_size|mlp_dim|feed_?forward.*|ffn_hidden_size|ffn_size)$"
)
_HEAD_DIM = r"(head_dim|d_kv|d_head|kv_channels|head_size|_head_width|attention_key_dim)$"
_LAYERS = r"((^|_)(num_hidden_layers|num_layers|n_layers?|layers|depth|num_blocks|n_blocks|num_encoder_blocks))$"
_POSITIONS = r"(max_position_embeddings|positions?|n_ctx|max_seq\w*|seq_length|max_length|block_size|context_length)$"
_EXPERTS = r"(num_experts|local_experts|routed_experts|n_experts|moe_num_experts|expert_num)$"
_CHOSEN = r"(experts_per_tok\w*|experts_per_token|top_?k|moe_topk|num_selected_experts|expert_topk)$"


def tiny(name: str, value: Any, size: int) -> Any:
    """What a field becomes; images have ``size`` pixels a side."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        return 0.0 if re.search(r"drop(out|path|_path|_rate|_prob)?", name) else value
    if isinstance(value, int):
        return _number(name, value, size)
    if isinstance(value, list | tuple) and value and all(type(x) is int for x in value):
        return _numbers(name, list(value), size)
    return value


def _number(name: str, value: int, size: int) -> int:
    for pattern, most in (
        (r"vocab(ulary)?_?size\w*$|n_vocab|vocab_size$", VOCABULARY),
        (_KEY_HEADS, KEY_HEADS),
        (_HEADS, HEADS),
        (_HEAD_DIM, HEAD_DIM),
        (r"lora_rank|_rank$|dim_dt", 16),
        (r"(image_size|img_size|input_size|input_resolution|crop_size)$", size),
        (r"(^|_)patch_size$", 8),
        (r"window_size$", 4),
        (_INNER, INNER),
        (_LAYERS, LAYERS),
        (_CHOSEN, 2),
        (_EXPERTS, 4),
        (r"(n_group|topk_group|num_expert_group)s?$", 1),
        (r"first_k_dense_replace", 1),
        (_WIDTH, WIDTH),
        (_POSITIONS, POSITIONS),
        (r"(num_mel_bins|feature_dim|n_mels|num_freq\w*)$", 16),
        (r"(num_queries|num_query_tokens|num_latents|query_length|num_buckets)$", 8),
        (r"(num_frames)$", 4),
        (r"(pos_emb_num|num_position_embeddings)$", 64),
        (r"(ssm_state_size|mamba_d_state|state_size|d_state)$", 8),
    ):
        if re.search(pattern, name):
            return min(value, most)
    return value


def _numbers(name: str, values: list[int], size: int) -> list[int]:
    if re.search(r"image_size|img_size|resolution", name):
        return [min(x, size) for x in values]
    if re.search(r"(depths|num_layers|layer_depths|blocks)$", name):
        return [1] * len(values)
    if re.search(r"(hidden_sizes|embed_dims?|widths|hidden_dims|channels|neck_hidden_sizes|conv_dim)$", name):
        return [max(8, 8 * round(x * 16 / min(values) / 8)) if max(values) > 64 else x for x in values]
    if re.search(r"window_size$", name):
        return [min(x, 4) for x in values]
    if name == "mrope_section":
        return [2, 1, 1][: len(values)]
    return values


def ungrouped(name: str, value: Any, size: int) -> Any:
    """As :func:`tiny`, with as many heads of keys as of queries."""
    small = tiny(name, value, size)
    return HEADS if re.search(_KEY_HEADS, name) and small == KEY_HEADS and value > KEY_HEADS else small


def scaled(heads: int) -> Callable[[str, Any, int], Any]:
    """As :func:`tiny`, but widths are divided by the factor by which ``heads`` become four; head_dim stays."""
    factor = max(heads // HEADS, 1)

    def rule(name: str, value: Any, size: int) -> Any:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if is_number and re.search(f"{_HEAD_DIM}|lora_rank", name):
            return value
        if is_number and re.search(f"{_KEY_HEADS}|{_HEADS}", name):
            return max(value // factor, 1)
        if is_number and re.search(f"{_INNER}|{_WIDTH}", name):
            return value // factor if value >= 128 and value % factor == 0 else value
        if name == "mrope_section":
            return value
        return tiny(name, value, size)

    return rule


def heads_of(config: Any) -> int:
    """The number of heads of a config, or of its largest part."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = next((getattr(text, n) for n in ("num_attention_heads", "n_head", "num_heads") if hasattr(text, n)), HEADS)
    return heads if isinstance(heads, int) else HEADS


def shrunk(config: Any, rule: Callable[[str, Any, int], Any] = tiny, size: int = 32) -> Any:
    """A config of the class of ``config``, small. ``config``: one with the defaults."""
    specials: dict[int, int] = {}
    return type(config)(**_fields(config, rule, size, specials))


def _fields(config: Any, rule: Callable[[str, Any, int], Any], size: int, specials: dict[int, int]) -> dict[str, Any]:
    own = _own_fields(config)
    kinds = own.get("layer_types")
    fields: dict[str, Any] = {}
    for name, value in own.items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            fields[name] = {**_fields(value, rule, size, specials), "model_type": value.model_type}
        elif re.search(r"_token_ids?$|_token_index$|_token$|_tokens?_id$|^image_token_id|_index$", name):
            fields[name] = _special(value, specials)
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
            fields[name] = _rope(value, rule, size)
        else:
            fields[name] = rule(name, value, size)
    layers = next((own[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if n in own), None)
    if isinstance(kinds, list) and kinds and all(isinstance(kind, str) for kind in kinds):
        different = list(dict.fromkeys(kinds))
        fields["layer_types"] = different if len(different) > 1 else different * LAYERS
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in fields:
                fields[name] = len(fields["layer_types"])
    number = next((fields[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if n in fields), LAYERS)
    for name, values in own.items():  # a word for each layer
        each = isinstance(values, list | tuple) and len(values) == layers and name != "layer_types"
        if each and all(isinstance(value, str) for value in values):
            different = list(dict.fromkeys(values))
            fields[name] = (different * number)[:number]
    for name, values in fields.items():  # a width for each stage goes with its heads
        if re.search(r"(hidden_sizes|embed_dims?)$", name) and isinstance(values, list):
            heads = next((fields[n] for n in ("num_attention_heads", "num_heads") if n in fields), None)
            if isinstance(heads, list | tuple) and len(heads) == len(values):
                fields[name] = [8 * number for number in heads]
    heads = fields.get("num_heads", fields.get("num_attention_heads"))
    if isinstance(heads, list | tuple) and isinstance(fields.get("embed_dim"), int):
        fields["embed_dim"] = 8 * heads[0]
    return fields


def _own_fields(config: Any) -> dict[str, Any]:
    """The fields that the class itself defines, by their defaults; those common to all configs stay as they are."""
    from transformers import PreTrainedConfig

    common = set(vars(PreTrainedConfig())) | set(getattr(PreTrainedConfig, "__dataclass_fields__", {}))
    common -= {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}
    renamed = set(getattr(config, "attribute_map", {}))
    parts = set(getattr(config, "sub_configs", {}))
    names = set(getattr(type(config), "__dataclass_fields__", {})) | parts
    fields = {}
    for name in sorted(names):
        if not name.startswith("_") and name not in common | renamed:
            with contextlib.suppress(Exception):  # one that each layer has its own of, say
                fields[name] = getattr(config, name)
    return fields


def _special(value: Any, specials: dict[int, int]) -> Any:
    if isinstance(value, list | tuple):
        return [_special(x, specials) for x in value]
    if not isinstance(value, int) or isinstance(value, bool) or 0 <= value < FIRST_SPECIAL - 60 or value < 0:
        return value
    return specials.setdefault(value, FIRST_SPECIAL + len(specials) % (VOCABULARY - FIRST_SPECIAL))


def _rope(value: Mapping[str, Any], rule: Callable[[str, Any, int], Any], size: int) -> dict[str, Any]:
    return {
        key: _rope(item, rule, size)
        if isinstance(item, Mapping)
        else rule(key, item, size)
        if key == "mrope_section"
        else item
        for key, item in value.items()
    }
