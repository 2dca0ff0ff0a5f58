"""Forward methods with transformers' signatures, built from ops. Put over a module's class by `hasten.patching`.

An overlay holds no state of its own. Its `facts` are a frozen dataclass on a cached subclass, so two models with
different facts never meet, and taking an overlay off is one assignment.
"""

from hasten.overlays.attending import BackboneFacts, BackboneOverlay
from hasten.overlays.attention import AttentionFacts, AttentionOverlay
from hasten.overlays.base import Overlay
from hasten.overlays.head import HeadFacts, HeadOverlay
from hasten.overlays.layer import LayerFacts, LayerOverlay
from hasten.overlays.mlp import MLPFacts, MLPOverlay
from hasten.overlays.norm import NormOverlay
from hasten.overlays.trained import StreamFacts, WideEmbedding, WideHead

__all__ = [
    "AttentionFacts",
    "AttentionOverlay",
    "BackboneFacts",
    "BackboneOverlay",
    "HeadFacts",
    "HeadOverlay",
    "LayerFacts",
    "LayerOverlay",
    "MLPFacts",
    "MLPOverlay",
    "NormOverlay",
    "Overlay",
    "StreamFacts",
    "WideEmbedding",
    "WideHead",
]
