"""What becomes of a layer's tensors between its forward and its backward."""

from enum import Enum


class Treatment(Enum):
    """From most device memory to least; docs/training.md counts the bytes."""

    KEEP = "keep"
    """All that the ops keep stays on the device; only norms, rotation and activation are made again."""
    REMAKE_MLP = "remake the MLP"
    """The attention half's tensors stay on the device; the MLP keeps its input alone and is made again."""
    HOST = "host"
    """As REMAKE_MLP, and what is kept waits in pinned host memory."""
    RECOMPUTE = "recompute"
    """Only the layer's input stays on the device (Chen et al. 2016, arXiv:1604.06174)."""
    OFFLOAD = "offload"
    """As RECOMPUTE, and the input waits in pinned host memory."""


ALIKE: dict[bool | str, Treatment] = {False: Treatment.KEEP, True: Treatment.RECOMPUTE, "offload": Treatment.OFFLOAD}
"""`use_gradient_checkpointing` -> what every layer gets; the other modes are planned."""
