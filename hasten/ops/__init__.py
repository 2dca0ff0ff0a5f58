"""Pure tensor functions: no nn.Module, no transformers. Each folder holds a contract, a reference in plain torch, and
(from the kernels' issue on) a Triton implementation with the same contract.

Shape suffixes: B batch, T tokens of a row, N tokens of all rows, E hidden size, F width of the MLP, H heads,
D channels of a head, V vocabulary, R rank of a LoRA.
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
