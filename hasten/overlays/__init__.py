"""Forward methods with transformers' signatures, built from ops. Put over a module's class by `hasten.patching`.

An overlay holds no state of its own. Its `overlay_config` are a frozen dataclass on a cached subclass, so two models with
different overlay_config never meet, and taking an overlay off is one assignment.
"""

from hasten.overlays.attention import AttentionConfig, AttentionOverlay
from hasten.overlays.backbone import BackboneConfig, BackboneOverlay
from hasten.overlays.base import Overlay
from hasten.overlays.fp32_head import Fp32Embedding, Fp32Head, Fp32WeightConfig
from hasten.overlays.head import HeadConfig, HeadOverlay
from hasten.overlays.layer import LayerConfig, LayerOverlay
from hasten.overlays.mlp import MLPConfig, MLPOverlay
from hasten.overlays.norm import NormOverlay

__all__ = [
    "AttentionConfig",
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
    "Fp32WeightConfig",
    "Fp32Embedding",
    "Fp32Head",
]
