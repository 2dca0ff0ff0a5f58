"""The schema of model families: what differs between architectures, as data. Code never compares a model_type.

A field names a field of the transformers config instead of holding a number, so that one `Family` serves all its
checkpoints. None means that the family does not have it.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Norm:
    """Normalisation over the last axis.

    kind: "rms" = Zhang & Sennrich 2019 (arXiv:1910.07467); "layer" = Ba et al. 2016 (arXiv:1607.06450), no bias.
    unit_offset: the stored weight w scales by (1 + w).
    fp32_weight: multiply by the weight in fp32 and cast last; False = cast to the input's dtype first (Llama).
    eps: config field that holds epsilon.
    """

    kind: Literal["rms", "layer"] = "rms"
    unit_offset: bool = False
    fp32_weight: bool = False
    eps: str = "rms_norm_eps"


@dataclass(frozen=True)
class Attention:
    """Causal self-attention with grouped queries and RoPE (Su et al. 2021, arXiv:2104.09864).

    rotation: "half" pairs channel i with i + D/2; "interleaved" pairs 2i with 2i + 1.
    rope_fp32: rotate in fp32 and cast back; False = in the model's dtype.
    rope_layers: the layers that have RoPE.
    qk_norm: norm on queries and keys before RoPE, over each head's channels.
    qk_norm_if: config field that switches `qk_norm` on.
    qk_norm_heads_first: transformers calls these norms on (B, H, T, D); False = on (B, T, H, D). Seen by hooks only.
    window: "never", "always" (config.sliding_window where set) or "by_layer" (where config.layer_types says so).
    scale: config field s; scores are multiplied by s (scale_power 1) or by s ** scale_power. None = 1 / sqrt(head_dim).
    softcap: config field c; scores become c * tanh(score / c).
    """

    rotation: Literal["half", "interleaved"] = "half"
    rope_fp32: bool = False
    rope_layers: Literal["all", "sliding"] = "all"
    qk_norm: Norm | None = None
    qk_norm_if: str | None = None
    qk_norm_heads_first: bool = False
    window: Literal["never", "always", "by_layer"] = "never"
    scale: str | None = None
    scale_power: float = 1.0
    softcap: str | None = None


@dataclass(frozen=True)
class MLP:
    """down(act(gate(x)) * up(x)). activation: config field that names the activation."""

    activation: str = "hidden_act"


@dataclass(frozen=True)
class Block:
    """How a decoder layer adds its branches to the residual stream h.

    residual: "serial"  h += attn(n1(h)); h += mlp(n2(h))
              "parallel" h += attn(n(h)) + mlp(n(h)), one norm for both
              "sandwich" as serial, with a second norm after each branch, before it is added
    multiplier: config field; every branch is multiplied by it before it is added.
    """

    residual: Literal["serial", "parallel", "sandwich"] = "serial"
    multiplier: str | None = None


@dataclass(frozen=True)
class Head:
    """From the last hidden state to logits: multiply or divide by config fields, then softcap."""

    multiplier: str | None = None
    divisor: str | None = None
    softcap: str | None = None


@dataclass(frozen=True)
class Classes:
    """Names of the family's transformers classes, in the Python module `module`."""

    module: str
    causal_lm: str
    layer: str
    attention: str
    mlp: str
    norm: str


@dataclass(frozen=True)
class Family:
    """Describes one transformers `model_type`.

    fp16_safe: False where activations are known to exceed fp16's range.
    """

    model_type: str
    classes: Classes
    norm: Norm = Norm()
    attention: Attention = Attention()
    mlp: MLP = MLP()
    block: Block = Block()
    head: Head = Head()
    fp16_safe: bool = True


def classes(package: str, prefix: str) -> Classes:
    """Returns the class names by transformers' naming scheme, for `transformers.models.<package>`."""
    return Classes(
        module=f"transformers.models.{package}.modeling_{package}",
        causal_lm=f"{prefix}ForCausalLM",
        layer=f"{prefix}DecoderLayer",
        attention=f"{prefix}Attention",
        mlp=f"{prefix}MLP",
        norm=f"{prefix}RMSNorm",
    )
