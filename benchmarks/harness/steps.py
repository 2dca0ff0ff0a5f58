"""Training steps of one model on random tokens: what is timed, and what the libraries are compared by."""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.checkpoints import checkpoint, with_positions
from benchmarks.harness.jobs import GIB, SHAPES, Job
from benchmarks.harness.timing import DEVICE
from benchmarks.harness.variants import build, import_library, planned

LEARNING_RATE = 2e-5
"""At 1e-4 AdamW's first steps, whose size does not depend on the gradient's, move transformers 1.6e-3 from itself (docs/log.md)."""
SAMPLED = 32


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def reset_peaks(empty_cache: bool = False) -> None:
    """Resets the peak statistics. empty_cache: first frees what an earlier plan or a failed step held."""
    if empty_cache:
        gc.collect()
        torch.cuda.empty_cache()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """{"peak_gib", "reserved_gib"}: the most allocated, and reserved by torch's allocator, since `reset_peaks`. 0 on a CPU."""
    found = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if DEVICE == "cuda" else (0, 0)
    return {"peak_gib": found[0] / GIB, "reserved_gib": found[1] / GIB}


class Steps:
    """Training steps of one model: forward under bf16 autocast, backward, fused AdamW, on random tokens.

    Step n sees the same tokens in every process, so that losses can be compared step by step. loss: batch -> loss.
    """

    def __init__(
        self, model: Any, loss: Callable[[Any], torch.Tensor], job: Job, variant: str = "hasten",
        rate: float = LEARNING_RATE, weight_decay: float = 0.01,
    ) -> None:  # fmt: skip
        self.model, self.loss, self.job, self.variant = model, loss, job, variant
        self.names = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, weight_decay=weight_decay, fused=True)
        self.generator = torch.Generator().manual_seed(2)

    def batch(self, length: int | None = None) -> torch.Tensor:
        """The next batch (B, T) of token ids, on the device."""
        shape = (self.job.batch, length or self.job.length)
        return torch.randint(10, SHAPES[self.job.shape]["vocab_size"], shape, generator=self.generator).to(DEVICE)

    def gradients(self, *batches: Any) -> torch.Tensor:
        """Accumulates the gradients of all batches. Returns the sum of their losses, without waiting for it."""
        losses = []
        for batch in batches:
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = self.loss(batch)
            loss.backward()
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def take(self, *batches: Any, look: Callable[[], None] | None = None) -> torch.Tensor:
        """Takes one step over all batches. look: called between the last backward and the optimizer."""
        loss = self.gradients(*batches)
        if look is not None:
            look()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def timed(self, *batches: Any) -> tuple[float, torch.Tensor]:
        """(seconds, loss) of one step, from idle device to idle device."""
        wait()
        begin = time.perf_counter()
        loss = self.take(*batches)
        wait()
        return time.perf_counter() - begin, loss

    def sample(self) -> list[float]:
        """SAMPLED elements of every gradient, the same ones in every process, in the order of the parameters' names."""
        generator, found = torch.Generator().manual_seed(4), []
        for _, parameter in self.names:
            at = torch.randint(parameter.numel(), (SAMPLED,), generator=generator).to(parameter.device)
            assert parameter.grad is not None
            found.append(parameter.grad.flatten()[at].float())
        return torch.cat(found).tolist()

    def warm(self, steps: int) -> dict[str, Any]:
        """Takes the first steps. Gradients are sampled at the second: at the first, B is zero and so is every gradient of A."""
        taken = [self.timed(self.batch())]
        gradients: list[float] = []
        if steps > 1:
            loss = self.take(self.batch(), look=lambda: gradients.extend(self.sample()))
            taken.append((0.0, loss))
        taken += [self.timed(self.batch()) for _ in range(steps - 2)]
        return {"first_s": taken[0][0], "losses": [float(loss) for _, loss in taken], "gradients": gradients}

    def run(self, steps: int, untimed: int) -> dict[str, Any]:
        losses = [self.take(self.batch()) for _ in range(untimed)]
        reset_peaks()
        taken = [self.timed(self.batch()) for _ in range(steps)]
        losses += [loss for _, loss in taken]
        seconds = [spent for spent, _ in taken]
        return {"seconds": seconds, **peaks(), **self.planned(), "losses": [float(loss) for loss in losses]}

    def planned(self, length: int | None = None) -> dict[str, Any]:
        """hasten's plan and predicted peak; {} for every other variant."""
        return planned(self.model, self.job.batch, length or self.job.length) if self.variant == "hasten" else {}


def load(variant: str, job: Job, mode: str, folder: Path, tree: Path | None = None) -> tuple[dict[str, float], Steps]:
    """Returns ({"import_s", "load_s": the checkpoint with its adapter}, the steps). folder: of the checkpoints. tree: see
    `import_library`."""
    imported = import_library(variant, tree)
    written = with_positions(checkpoint(job.shape, folder), job.length)
    wait()
    begin = time.perf_counter()
    model, loss = build(variant, job, mode, written)
    wait()
    loaded = time.perf_counter() - begin
    torch.cuda.empty_cache()
    return {"import_s": imported, "load_s": loaded}, Steps(model, loss, job, variant)
