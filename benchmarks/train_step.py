"""One library in a process of its own (some peers patch the whole process), taking training steps when told to.

    python -m benchmarks.train_step VARIANT JOB MODE FOLDER               3 warm and 8 timed steps, one JSON line
    python -m benchmarks.train_step VARIANT JOB MODE FOLDER --profile F   and a profile of one step, appended to F
    python -m benchmarks.train_step VARIANT JOB MODE FOLDER --serve       waits for commands, see below
VARIANT, JOB, MODE: see benchmarks/jobs.py. FOLDER holds, or gets, the checkpoints.

Served commands, one JSON object a line on stdin, answered by one on stdout:
    {"do": "warm", "steps": n}                  losses, first_s (the first step, all compilation in it), gradients (a sample)
    {"do": "run", "steps": n, "untimed": m}     losses of m + n steps, seconds of the last n, peak_gib of these; of hasten
                                                plan and predicted_gib as well
    {"do": "profile", "wall_s": s}              text, summary                  (see benchmarks/profiling.py)
    {"do": "costs", "lengths": [...]}           host_waits, lengths            (see benchmarks/fixed_costs.py)
    {"do": "stop"}
The first line, unasked, says that the model is loaded: import_s, load_s. An error is answered as {"error": ...}, and ends
the process. After every command the memory cache is emptied, so that a waiting worker holds what it must and no more.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.jobs import GIB, JOBS, MODES, SHAPES, VARIANTS, Job
from benchmarks.shapes import checkpoint
from benchmarks.variants import build, import_library, planned

WARM, TIMED = 3, 8
LEARNING_RATE = 2e-5
"""At 1e-4 AdamW's first steps, of one size whatever the gradient's, make transformers differ from itself by 1.6e-3 (docs/log.md)."""
SAMPLED = 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def forget_peaks() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """{"peak_gib", "reserved_gib"}: the most allocated, and held by torch's allocator, since `forget_peaks`. 0 on a CPU."""
    found = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if DEVICE == "cuda" else (0, 0)
    return {"peak_gib": found[0] / GIB, "reserved_gib": found[1] / GIB}


class Steps:
    """Training steps of one model: forward under bf16 autocast, backward, fused AdamW, on random tokens.

    Step n sees the same tokens in every process, so losses can be compared step by step.
    """

    def __init__(
        self, model: Any, loss: Callable[[torch.Tensor], torch.Tensor], job: Job, variant: str = "hasten"
    ) -> None:
        self.model, self.loss, self.job, self.variant = model, loss, job, variant
        trained = [p for p in model.parameters() if p.requires_grad]
        self.names = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
        self.generator = torch.Generator().manual_seed(2)
        self.words = SHAPES[job.shape]["vocab_size"]

    def batch(self, length: int | None = None) -> torch.Tensor:
        """The next batch (B, T) of token ids, on the device."""
        shape = (self.job.batch, length or self.job.length)
        return torch.randint(10, self.words, shape, generator=self.generator).to(DEVICE)

    def take(self, ids: torch.Tensor, look: Callable[[], None] | None = None) -> torch.Tensor:
        """One step; its loss, which nobody has waited for yet. look: called when the gradients are there."""
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = self.loss(ids)
        loss.backward()
        if look is not None:
            look()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def timed(self, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
        """(seconds, loss) of one step, from idle to idle."""
        wait()
        begin = time.perf_counter()
        loss = self.take(ids)
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
        """The first steps. Gradients are sampled at the second one: at the first, B is zero and with it every gradient of A."""
        taken = [self.timed(self.batch())]
        gradients: list[float] = []
        if steps > 1:
            loss = self.take(self.batch(), lambda: gradients.extend(self.sample()))
            taken.append((0.0, loss))
        taken += [self.timed(self.batch()) for _ in range(steps - 2)]
        return {"first_s": taken[0][0], "losses": [float(loss) for _, loss in taken], "gradients": gradients}

    def run(self, steps: int, untimed: int) -> dict[str, Any]:
        losses = [self.take(self.batch()) for _ in range(untimed)]
        forget_peaks()
        taken = [self.timed(self.batch()) for _ in range(steps)]
        losses += [loss for _, loss in taken]
        seconds, told = [seconds for seconds, _ in taken], peaks()
        if self.variant == "hasten":
            told |= planned(self.model, self.job.batch, self.job.length)
        return {"losses": [float(loss) for loss in losses], "seconds": seconds, **told}


def answer(steps: Steps, command: dict[str, Any]) -> dict[str, Any]:
    what = command["do"]
    if what == "warm":
        return steps.warm(command["steps"])
    if what == "run":
        return steps.run(command["steps"], command["untimed"])
    if what == "profile":
        from benchmarks.profiling import profile_step

        ids = steps.batch()
        return profile_step(lambda: steps.take(ids), command["wall_s"])
    if what == "costs":
        from benchmarks.fixed_costs import host_waits, new_lengths

        return {"host_waits": host_waits(steps), "lengths": new_lengths(steps, command["lengths"])}
    raise ValueError(f"no such command: {what}")


def serve(make: Callable[[], tuple[dict[str, float], Steps]], commands: Iterator[str], replies: TextIO) -> None:
    """Loads with `make`, then answers `commands` one by one. An error is reported to the other side and raised here."""

    def say(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        loaded, steps = make()
        say(loaded)
        for line in commands:
            command = json.loads(line)
            if command["do"] == "stop":
                return
            reply = answer(steps, command)
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
            say(reply)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"[:2000]})
        raise


def load(variant: str, name: str, mode: str, folder: Path, tree: Path | None = None) -> tuple[dict[str, float], Steps]:
    """(seconds of import and of loading the checkpoint with its adapter put on, the steps). tree: see `import_library`."""
    imported = import_library(variant, tree)
    job = JOBS[name]
    written = checkpoint(job.shape, folder)
    wait()
    begin = time.perf_counter()
    model, loss = build(variant, job, mode, written)
    wait()
    loaded = time.perf_counter() - begin
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return {"import_s": imported, "load_s": loaded}, Steps(model, loss, job, variant)


def _own_stdout() -> TextIO:
    """The real stdout, for answers only: whatever libraries print goes to stderr from here on."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def _run_alone(args: argparse.Namespace) -> None:
    import statistics

    loaded, steps = load(args.variant, args.job, args.mode, args.folder, args.tree)
    warm, timed = steps.warm(WARM), steps.run(TIMED, 0)
    seconds = timed.pop("seconds")
    warm.pop("gradients")
    result = {**loaded, **warm, **timed, "losses": warm["losses"] + timed["losses"]}
    result["ms"] = statistics.median(seconds) * 1e3
    if args.profile is not None:
        profiled = answer(steps, {"do": "profile", "wall_s": statistics.median(seconds)})
        with args.profile.open("a") as file:
            file.write(f"{args.job} {args.variant} {args.mode}\n{profiled['text']}\n")
        result["profile"] = profiled["summary"]
    print("RESULT " + json.dumps(result))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--tree", type=Path, help="import hasten from this folder")
    args = parser.parse_args(arguments)
    if args.serve:
        serve(lambda: load(args.variant, args.job, args.mode, args.folder, args.tree), iter(sys.stdin), _own_stdout())
    else:
        _run_alone(args)


if __name__ == "__main__":
    main(sys.argv[1:])
