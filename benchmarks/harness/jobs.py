"""The training jobs that are measured, the libraries that run them, their targets, and an estimate of their memory.

Imports neither torch nor transformers: Unsloth must be imported before both.
"""

from dataclasses import dataclass
from typing import Any

GIB = 2**30

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "llama-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "tie_word_embeddings": False, "max_position_embeddings": 131072,
    },
    "gemma-2b": {
        "model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384,
        "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
        "tie_word_embeddings": True,
    },
    "command-r-slice": {
        "model_type": "cohere", "vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528,
        "num_hidden_layers": 6, "num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 128,
        "logit_scale": 0.0625, "use_qk_norm": False, "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One training job on random tokens without padding. kind: "lora" (on all seven linears), "qlora" (over NF4) or "full".

    budget_gib: hasten's memory budget in mode "budget", the peak of Unsloth's default. rank: of the LoRA.
    offload_embedding: hasten and Unsloth keep the embedding in CPU memory.
    """

    title: str
    shape: str
    kind: str
    batch: int
    length: int
    budget_gib: float | None = None
    rank: int = 16
    offload_embedding: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length


JOBS: dict[str, Job] = {
    "8b-lora": Job("Llama-3.1-8B shape, LoRA r=16, 4 x 2048 tokens", "llama-8b", "lora", 4, 2048, 17.8),
    "8b-qlora": Job("Llama-3.1-8B shape, QLoRA r=16, 4 x 2048 tokens", "llama-8b", "qlora", 4, 2048, 8.2),
    "1b-lora": Job("Llama-3.2-1B shape, LoRA r=16, 8 x 2048 tokens", "llama-1b", "lora", 8, 2048, 4.9),
    "1b-full": Job("Llama-3.2-1B shape, full fine-tuning, 8 x 2048 tokens", "llama-1b", "full", 8, 2048, 10.6),
    "gemma-2b-qlora": Job("Gemma-2B shape, QLoRA r=16, 4 x 2048 tokens", "gemma-2b", "qlora", 4, 2048, 6),
    "command-r-qlora": Job(
        "Command R shape, 6 layers, QLoRA r=16, 4 x 2048 tokens", "command-r-slice", "qlora", 4, 2048, 9.4
    ),
    "tiny-lora": Job("a tiny Llama, LoRA r=16, 2 x 64 tokens", "tiny", "lora", 2, 64, 0.25),
}
MEASURED = [name for name in JOBS if not name.startswith("tiny")]
MODES: dict[str, str] = {
    "keep": "nothing recomputed",
    "recompute": "each layer recomputed",
    "offload": "each layer recomputed, its input offloaded to CPU memory where a library can",
    "default": "each library's default checkpointing",
    "budget": "hasten within the peak of Unsloth's default",
}
RECOMPUTED = ("recompute", "offload")
"""Modes in which hasten recomputes every layer."""
VARIANTS: dict[str, str] = {
    "hasten": "hasten",
    "hasten-before": "hasten of another source tree",
    "unsloth": "Unsloth",
    "liger": "Liger",
    "transformers": "transformers + PEFT",
    "trl": "transformers + PEFT + TRL's fused head",
}
BEFORE = "hasten-before"
"""The hasten package of another checkout, used through its public API only."""
PACKAGE_OF = {"unsloth": "unsloth", "liger": "liger-kernel", "transformers": "transformers", "trl": "trl"}


def is_hasten(variant: str) -> bool:
    return variant in ("hasten", BEFORE)


TARGETS: dict[tuple[str, str], tuple[float, float | None]] = {
    ("8b-lora", "keep"): (410, 40),
    ("8b-qlora", "keep"): (410, 30),
    ("1b-lora", "keep"): (150, None),
    **{
        (job, mode): (ms, JOBS[job].budget_gib)
        for job, ms in (("1b-lora", 215), ("gemma-2b-qlora", 230), ("command-r-qlora", 330), ("1b-full", 210))
        for mode in ("recompute", "budget")
    },
}
"""Targets of hasten on an H200: (milliseconds a step, peak GiB or None)."""
RATIOS = {(job, mode): x for mode, x in (("budget", 1.25), ("default", 1.75)) for job in ("8b-lora", "8b-qlora")}
"""Target of Unsloth's step time over hasten's."""


@dataclass(frozen=True)
class Sizes:
    """Parameters of a shape: `linears` in all layers' projections, `head` = vocabulary x hidden size, untied `embeddings`."""

    linears: int
    head: int
    embeddings: int


def sizes(shape: dict[str, Any]) -> Sizes:
    width, mlp, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    head = shape["vocab_size"] * width
    linears = layers * (2 * width * queries + 2 * width * keys + 3 * width * mlp)
    return Sizes(linears, head, 0 if shape["tie_word_embeddings"] else head)


KEPT_PER_LAYER = {"hasten": 1.1, BEFORE: 1.1, "unsloth": 1.2, "liger": 1.7, "transformers": 2.2, "trl": 2.2}
KEPT_IN_FULL = 2.8
WHOLE_LOGITS = {"transformers"}
OVERHEAD_GIB = 1.0


def memory_gib(job: Job, mode: str, variant: str) -> tuple[float, float]:
    """Estimates (GiB of a paused worker, GiB of it during a step). Rounded up; used only to group workers.

    Paused: weights, optimizer, CUDA context. A step adds the layers' saved activations, in units of (6 width + 2 MLP width)
    bf16 numbers a token and layer (fitted to measured peaks), 14 bytes a logit where all logits exist at once, and gradients.
    """
    shape, tokens = SHAPES[job.shape], job.tokens
    found = sizes(shape)
    dense = found.head + found.embeddings
    weights = dense * 2 + found.linears * (0.53 if job.kind == "qlora" else 2)
    trained = found.linears + dense if job.kind == "full" else 0
    paused = (weights + 4 * trained) / GIB + OVERHEAD_GIB
    width, mlp, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    layer = (KEPT_IN_FULL if trained else KEPT_PER_LAYER[variant]) * (6 * width + 2 * mlp) * 2 * tokens
    saves_all = mode == "keep" or (mode == "default" and is_hasten(variant))
    saved = layers * layer if saves_all else layers * width * 2 * tokens + layer
    logits = 14 * tokens * shape["vocab_size"] if variant in WHOLE_LOGITS else 2 * GIB
    return paused, paused + (saved + logits + 2 * trained) * 1.15 / GIB
