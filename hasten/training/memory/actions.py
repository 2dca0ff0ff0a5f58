"""Defines what happens to a layer's saved activations between its forward and its backward."""

from enum import Enum


class ActivationAction(Enum):
    """An action for a layer's saved activations, from most device memory to least; docs/memory.md counts the bytes."""

    SAVE_ALL = "save all"
    """All activations that the ops save stay on the device; only norms, RoPE and the MLP's activation function are
    recomputed."""
    RECOMPUTE_MLP = "recompute the MLP"
    """Attention's saved activations stay on the device; the MLP saves its input and is recomputed."""
    RECOMPUTE_MLP_OFFLOAD_REST = "recompute the MLP, offload the rest"
    """As RECOMPUTE_MLP, with the saved activations offloaded to pinned CPU memory."""
    RECOMPUTE = "recompute"
    """Activation checkpointing: only the layer's input is saved, on the device (Chen et al. 2016, arXiv:1604.06174)."""
    OFFLOAD = "offload"
    """As RECOMPUTE, with the layer's input offloaded to pinned CPU memory."""


UNIFORM_ACTIONS: dict[bool | str, ActivationAction] = {
    False: ActivationAction.SAVE_ALL,
    True: ActivationAction.RECOMPUTE,
    "offload": ActivationAction.OFFLOAD,
}
"""`use_gradient_checkpointing` -> the action of every layer; the other modes are planned per layer."""
