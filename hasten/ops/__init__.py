"""Pure tensor functions: no nn.Module, no transformers. One folder per op:

    __init__.py    the contract: signature, shapes, dtypes, which inputs get gradients, the equation; picks the backend
    reference.py   plain torch, the clearest way to write it: the oracle of the tests, and what runs on a CPU
    kernel.py, or kernels/*.py where there are several: Triton kernels, their launchers and autograd Functions

Shape suffixes: B batch, T tokens of a sequence, N tokens of all sequences, E hidden size, F intermediate size of the MLP,
H query heads, K key/value heads, D channels of a head, V vocabulary, R rank of a LoRA, O output channels. In kernels and
launchers "row" and "column" are those of a matrix; a row is one token unless a docstring says otherwise.
"""

from hasten.ops.attention import attend
from hasten.ops.glu import glu
from hasten.ops.linear_cross_entropy import (
    LoraHead,
    ScoreConfig,
    TokenScores,
    linear_cross_entropy,
    linear_cross_entropy_loss,
    score_logits,
)
from hasten.ops.norm import NormConfig, NormInput, add_norm, norm, norm_with_residual
from hasten.ops.rope import QKNorm, qk_rope

__all__ = [
    "LoraHead",
    "NormInput",
    "NormConfig",
    "QKNorm",
    "ScoreConfig",
    "TokenScores",
    "attend",
    "glu",
    "linear_cross_entropy",
    "linear_cross_entropy_loss",
    "norm",
    "norm_with_residual",
    "add_norm",
    "qk_rope",
    "score_logits",
]
