"""A decoder layer: norms, branches and the residual stream, in the three arrangements that families use."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from hasten.ops.backend import backend_for
from hasten.overlays.attention import AttentionOverlay
from hasten.overlays.base import Overlay
from hasten.overlays.head_inputs import compute_dtype
from hasten.overlays.mlp import AS_CONFIGURED, MLPOverlay, TileRows
from hasten.overlays.norm import NormOverlay
from hasten.weights import is_watched

CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
NORMS = {
    "serial": ("input_layernorm", "post_attention_layernorm"),
    "parallel": ("input_layernorm",),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""A layer's norms, in each arrangement of the branches."""


@dataclass(frozen=True)
class LayerCheckpoint:
    """What transformers calls in place of torch's checkpoint: run(index, function, *args), of `training.memory`."""

    run: Callable[..., Any]
    index: int

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.run(self.index, function, *args)


@dataclass(frozen=True)
class LayerConfig:
    """`spec.Block` with the multiplier's value (1.0 = none)."""

    residual: Literal["serial", "parallel", "sandwich"]
    multiplier: float = 1.0


class LayerOverlay(Overlay):
    overlay_config: ClassVar[LayerConfig]
    runs = "decoder layer"

    @property
    def _gradient_checkpointing_func(self) -> Any:
        """transformers' own attribute. A `LayerCheckpoint` stays until it is deleted, whatever a trainer sets meanwhile."""
        if CHECKPOINT_FUNCTION not in self.__dict__:
            raise AttributeError(CHECKPOINT_FUNCTION)
        return self.__dict__[CHECKPOINT_FUNCTION]

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Any) -> None:
        if isinstance(self.__dict__.get(CHECKPOINT_FUNCTION), LayerCheckpoint) and not isinstance(
            function, LayerCheckpoint
        ):
            return
        self.__dict__[CHECKPOINT_FUNCTION] = function

    @_gradient_checkpointing_func.deleter
    def _gradient_checkpointing_func(self) -> None:
        self.__dict__.pop(CHECKPOINT_FUNCTION, None)

    def forward(
        self, hidden_states: torch.Tensor, *, mlp_tile: TileRows = AS_CONFIGURED, **kwargs: Any
    ) -> torch.Tensor:
        """hidden_states: (B, T, E). mlp_tile: rows at a time of the MLP, for this call. Other keyword arguments go to the
        attention, as in transformers' layers."""
        if self._branches_add(hidden_states):
            return self._fused(hidden_states, mlp_tile, kwargs)
        mlp = partial(self.mlp, tile_rows=mlp_tile) if isinstance(self.mlp, MLPOverlay) else self.mlp
        normed = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **kwargs)
        if self.overlay_config.residual == "parallel":
            return hidden_states + self._branch(attended) + self._branch(mlp(normed))
        if self.overlay_config.residual == "sandwich":
            hidden_states = hidden_states + self._branch(self.post_attention_layernorm(attended))
            fed = mlp(self.pre_feedforward_layernorm(hidden_states))
            return hidden_states + self._branch(self.post_feedforward_layernorm(fed))
        hidden_states = hidden_states + self._branch(attended)
        return hidden_states + self._branch(mlp(self.post_attention_layernorm(hidden_states)))

    def _branches_add(self, hidden_states: torch.Tensor) -> bool:
        """Whether branches can join the stream in passes that run anyway: all parts are known, and nobody is watching them."""
        if backend_for(hidden_states) != "triton":
            return False
        if compute_dtype(hidden_states) != hidden_states.dtype:
            return False  # a stream wider than autocast's products must not be rounded by them
        if self.overlay_config.multiplier != 1.0 and self.overlay_config.residual != "serial":
            return False
        norms = [getattr(self, name) for name in NORMS[self.overlay_config.residual]]
        known = ((self.self_attn, AttentionOverlay), (self.mlp, MLPOverlay), *((norm, NormOverlay) for norm in norms))
        return all(isinstance(module, kind) and not is_watched(module) for module, kind in known)

    def _fused(self, stream: torch.Tensor, mlp_tile: TileRows, kwargs: dict[str, Any]) -> torch.Tensor:
        """The stream's gradients meet in the norms. A branch joins the stream in its last product where nothing is between
        them, else in its own norm's pass, or scaled in one pass."""
        scale, after = self.overlay_config.multiplier, self.overlay_config.residual == "sandwich"
        adds = scale == 1.0 and not after  # whether a branch's last product adds to the stream
        normed, stream, source = self.input_layernorm.with_residual(stream)
        branch, _ = self.self_attn(hidden_states=normed, residual=stream if adds else None, norm_input=source, **kwargs)
        stream = branch if adds else self._joined(stream, branch, self.post_attention_layernorm if after else None)
        if self.overlay_config.residual != "parallel":
            before = self.pre_feedforward_layernorm if after else self.post_attention_layernorm
            normed, stream, source = before.with_residual(stream)
        branch = self.mlp(normed, residual=stream if adds else None, norm_input=source, tile_rows=mlp_tile)
        return branch if adds else self._joined(stream, branch, self.post_feedforward_layernorm if after else None)

    def _joined(self, stream: torch.Tensor, branch: torch.Tensor, norm: Any) -> torch.Tensor:
        return (
            torch.add(stream, branch, alpha=self.overlay_config.multiplier)
            if norm is None
            else norm.add_to(branch, stream)
        )

    def _branch(self, branch: torch.Tensor) -> torch.Tensor:
        return branch if self.overlay_config.multiplier == 1.0 else branch * self.overlay_config.multiplier
