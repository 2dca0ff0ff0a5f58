"""Training steps of one library. Served in a process of its own, since some libraries patch the whole process.

    python -m benchmarks.harness.steps VARIANT JOB MODE FOLDER [--tree TREE]      see jobs.py; FOLDER holds the checkpoints
One JSON object a line on stdin is a command; each is answered by one line on stdout:
    {"do": "warm", "steps": n}                  losses, first_s (the first step with all compilation), gradients (a sample)
    {"do": "run", "steps": n, "untimed": m}     losses of m + n steps, seconds of the last n and their peak_gib; for hasten
                                                also plan and predicted_gib
    {"do": "profile", "wall_s": s}              text, summary                  (see step_costs.py)
    {"do": "costs", "lengths": [...]}           host_waits, lengths            (see step_costs.py)
The first line, unasked, says that the model is loaded: import_s, load_s. An error is answered as {"error": ...} and ends the
process. The CUDA cache is emptied after every command, so that a waiting worker holds as little as possible.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.harness.checkpoints import checkpoint, with_positions
from benchmarks.harness.jobs import GIB, JOBS, MODES, SHAPES, VARIANTS, Job
from benchmarks.harness.variants import build, import_library, planned

LEARNING_RATE = 2e-5
"""At 1e-4 AdamW's first steps, whose size does not depend on the gradient's, move transformers 1.6e-3 from itself (docs/log.md)."""
SAMPLED = 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def reset_peaks(empty_cache: bool = False) -> None:
    """Resets the peak statistics. empty_cache: first frees what an earlier plan or a failed step held."""
    if empty_cache:
        gc.collect()
    if DEVICE == "cuda":
        if empty_cache:
            torch.cuda.empty_cache()
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
        self,
        model: Any,
        loss: Callable[[Any], torch.Tensor],
        job: Job,
        variant: str = "hasten",
        rate: float = LEARNING_RATE,
        weight_decay: float = 0.01,
    ) -> None:
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
        told: dict[str, Any] = {"seconds": [seconds for seconds, _ in taken], **peaks()}
        return told | self.planned() | {"losses": [float(loss) for loss in losses]}

    def planned(self, length: int | None = None) -> dict[str, Any]:
        """hasten's plan and predicted peak; {} for every other variant."""
        return planned(self.model, self.job.batch, length or self.job.length) if self.variant == "hasten" else {}


def answer(steps: Steps, command: dict[str, Any]) -> dict[str, Any]:
    what = command["do"]
    if what == "warm":
        return steps.warm(command["steps"])
    if what == "run":
        return steps.run(command["steps"], command["untimed"])
    from benchmarks import step_costs  # imports hasten: not in the other libraries' workers

    if what == "profile":
        ids = steps.batch()
        return step_costs.profile_step(lambda: steps.take(ids), command["wall_s"])
    if what == "costs":
        lengths = step_costs.new_lengths(steps, command["lengths"])
        return {"host_waits": step_costs.host_waits(steps), "lengths": lengths}
    raise ValueError(f"no such command: {what}")


def serve(make: Callable[[], tuple[dict[str, float], Steps]], commands: Iterator[str], replies: TextIO) -> None:
    """Loads with `make`, then answers each command. An error is reported and raised."""

    def say(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        loaded, steps = make()
        say(loaded)
        for line in commands:
            reply = answer(steps, json.loads(line))
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
            say(reply)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"[:2000]})
        raise


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
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return {"import_s": imported, "load_s": loaded}, Steps(model, loss, job, variant)


def _own_stdout() -> TextIO:
    """The real stdout, for answers only; from here on, libraries print to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tree", type=Path, help="import hasten from this folder")
    args = parser.parse_args(arguments)
    job = JOBS[args.job]
    serve(lambda: load(args.variant, job, args.mode, args.folder, args.tree), iter(sys.stdin), _own_stdout())


if __name__ == "__main__":
    main(sys.argv[1:])
