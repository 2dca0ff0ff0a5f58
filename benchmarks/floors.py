"""The least time that a training step can take at a card's measured ceilings."""

from collections.abc import Mapping

from benchmarks.jobs import RECOMPUTED, SHAPES, Job, sizes


def floor_ms(job: Job, mode: str, ceilings: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds a step of `job`, by part and in "total". ceilings: as from `benchmarks.ceilings.measure`.

    With P weights in the layers' linears, N tokens a step, and a product of (N, in) by (in, out) counted as 2 N in out:
    - "products": 4 P N (output, and gradient of the input), + 2 P N where the weights train, + 2 P N where layers are
      recomputed, at the rate of a large product;
    - "head": 4 N V E, + 2 N V E where it trains;
    - "attention": causal, so half of all pairs: 2 B H T^2 D forward (once more where recomputed) and 5 B H T^2 D backward
      (five products in place of two), at attention's own rates;
    - "weights": bytes at the rate of a copy. NF4: half a byte read and two written for each weight, forward and
      backward. Full fine-tuning: AdamW reads weight, gradient and two moments and writes three, two bytes each.
    Nothing else is counted: norms, rotation, activation, LoRA and launches are what there is to win or lose. "default"
    and "budget" have the floor of "keep": no layer must be made again as long as host memory could hold what it keeps.
    """
    shape, found, tokens = SHAPES[job.shape], sizes(SHAPES[job.shape]), job.tokens
    full, again = job.kind == "full", mode in RECOMPUTED
    per_weight = 4 + 2 * full + 2 * again
    pairs = job.batch * shape["num_attention_heads"] * job.length**2 * shape["head_dim"] * shape["num_hidden_layers"]
    attention = 2 * pairs * (1 + again) / ceilings["attention_forward"] + 5 * pairs / ceilings["attention_backward"]
    moved = 0.0
    if job.kind == "qlora":
        moved = 2 * 2.5 * found.linears
    elif full:
        moved = 14.0 * (found.linears + found.head + found.embeddings)
    parts = {
        "products": per_weight * found.linears * tokens / ceilings["matmul"],
        "head": (4 + 2 * full) * found.head * tokens / ceilings["matmul"],
        "attention": attention,
        "weights": moved / ceilings["copy"],
    }
    parts = {name: seconds * 1e3 for name, seconds in parts.items()}
    return {**parts, "total": sum(parts.values())}
