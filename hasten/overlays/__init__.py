"""Defines forward methods with transformers' signatures, built from ops. `hasten.patching` puts them over a module's
class.

An overlay holds no state. Its `overlay_config` is a frozen dataclass on a cached subclass, so models with different
configs can be in one process, and taking an overlay off is one assignment of `module.__class__`.
"""

from hasten.overlays.attention import AttentionConfig, AttentionOverlay
from hasten.overlays.backbone import BackboneConfig, BackboneOverlay
from hasten.overlays.base import Overlay
from hasten.overlays.context import AttentionContext, SpanAttention, StockAttention
from hasten.overlays.fp32_head import Fp32Embedding, Fp32Head, Fp32WeightConfig
from hasten.overlays.head import HeadConfig, HeadOverlay
from hasten.overlays.layer import LayerConfig, LayerOverlay
from hasten.overlays.mlp import MLPConfig, MLPOverlay
from hasten.overlays.norm import NormOverlay
from hasten.overlays.stock_head import StockHeadOverlay

__all__ = [
    "AttentionConfig",
    "AttentionContext",
    "AttentionOverlay",
    "BackboneConfig",
    "BackboneOverlay",
    "HeadConfig",
    "HeadOverlay",
    "LayerConfig",
    "LayerOverlay",
    "MLPConfig",
    "MLPOverlay",
    "NormOverlay",
    "Overlay",
    "SpanAttention",
    "StockAttention",
    "StockHeadOverlay",
    "Fp32WeightConfig",
    "Fp32Embedding",
    "Fp32Head",
]
