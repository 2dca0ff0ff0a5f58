"""The options of a norm."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NormConfig:
    """What distinguishes the norms of model families; the equations are at the top of `ops.norm`.

    eps: added to the mean of squares or the variance.
    kind: "rms" = Zhang & Sennrich 2019 (arXiv:1910.07467), no mean; "layer" = Ba et al. 2016 (arXiv:1607.06450), no bias.
    unit_offset: the weight w scales by (1 + w).
    fp32_weight: multiply by the weight in fp32 and cast last; False = cast to the input's dtype first.
    """

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    unit_offset: bool = False
    fp32_weight: bool = False
