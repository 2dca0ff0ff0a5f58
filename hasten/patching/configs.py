"""Builds overlay configs from a family's data file and a checkpoint's config."""

from typing import Any

from hasten.errors import ContractError
from hasten.families.schema import Family, Norm
from hasten.ops import NormConfig
from hasten.ops.attention import LARGEST_HEAD
from hasten.overlays import AttentionConfig, BackboneConfig, HeadConfig, LayerConfig, MLPConfig


def _field(config: Any, name: str) -> Any:
    """Returns a field that the family's data file names. Raises ContractError where the config has no such field."""
    if not hasattr(config, name):
        raise ContractError(f"{type(config).__name__} has no field {name!r}, which the family's data file names")
    return getattr(config, name)


def norm_config(norm: Norm, config: Any) -> NormConfig:
    return NormConfig(_field(config, norm.eps), norm.kind, norm.unit_offset, norm.fp32_weight)


def attention_config(family: Family, config: Any, layer: int) -> AttentionConfig:
    spec = family.attention
    kinds = getattr(config, "layer_types", None)
    sliding = spec.window == "always" or (
        spec.window == "by_layer" and bool(kinds) and kinds[layer] == "sliding_attention"
    )
    window = getattr(config, "sliding_window", None) if sliding else None
    normed = spec.qk_norm is not None and (spec.qk_norm_if is None or _field(config, spec.qk_norm_if))
    return AttentionConfig(
        scale=_field(config, spec.scale) ** spec.scale_power if spec.scale else _head_dim(config) ** -0.5,
        rotation=spec.rotation,
        rope_fp32=spec.rope_fp32,
        use_rope=spec.rope_layers == "all" or window is not None,
        window=window,
        softcap=_field(config, spec.softcap) if spec.softcap else None,
        qk_norm=norm_config(spec.qk_norm, config) if spec.qk_norm is not None and normed else None,
        qk_norm_heads_first=spec.qk_norm_heads_first,
    )


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def backbone_config(family: Family, config: Any, asked: str | None) -> BackboneConfig:
    """Builds the backbone's config. asked: the attention backend that the user named, which then runs; None = hasten
    chooses on a GPU.

    Replaces only transformers' own default: sdpa, and eager where scores have a softcap.
    """
    name = config._attn_implementation
    softcapped = family.attention.softcap is not None and _field(config, family.attention.softcap) is not None
    reason = ""
    if asked is not None:
        reason = f"attn_implementation={asked!r} was asked for"
    elif name != "sdpa" and not (name == "eager" and softcapped):
        reason = f"the config names {name}"
    elif _head_dim(config) > LARGEST_HEAD:
        reason = f"head_dim is {_head_dim(config)}; the kernels take up to {LARGEST_HEAD}"
    elif not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        reason = "this model's attention is not causal"
    return BackboneConfig(None if reason else name, reason, getattr(config, "attention_dropout", 0.0) or 0.0)


def mlp_config(family: Family, config: Any) -> MLPConfig:
    return MLPConfig(_field(config, family.mlp.activation))


def layer_config(family: Family, config: Any) -> LayerConfig:
    multiplier = family.block.multiplier
    return LayerConfig(family.block.residual, _field(config, multiplier) if multiplier else 1.0)


def head_config(family: Family, config: Any, max_seq_length: int | None = None) -> HeadConfig:
    spec = family.head
    scale = _field(config, spec.multiplier) if spec.multiplier else 1.0
    if spec.divisor:
        scale = scale / _field(config, spec.divisor)
    return HeadConfig(scale, _field(config, spec.softcap) if spec.softcap else None, max_seq_length)
