"""Pure tensor functions: no nn.Module, no transformers. Each folder holds a contract, a reference in plain torch, and
(from the kernels' issue on) a Triton implementation with the same contract.

Shape suffixes: B batch, T tokens of a row, N tokens of all rows, E hidden size, F width of the MLP, H heads,
D channels of a head, V vocabulary, R rank of a LoRA.
"""

from hasten.ops.attention import attend
from hasten.ops.glu import glu
from hasten.ops.linear_cross_entropy import (
    LoraHead,
    ScoreRule,
    TokenScores,
    linear_cross_entropy,
    linear_cross_entropy_loss,
    score_logits,
)
from hasten.ops.norm import NormInput, NormRule, norm, norm_and_pass, norm_onto
from hasten.ops.rope import QKNorm, qk_rope

__all__ = [
    "LoraHead",
    "NormInput",
    "NormRule",
    "QKNorm",
    "ScoreRule",
    "TokenScores",
    "attend",
    "glu",
    "linear_cross_entropy",
    "linear_cross_entropy_loss",
    "norm",
    "norm_and_pass",
    "norm_onto",
    "qk_rope",
    "score_logits",
]
