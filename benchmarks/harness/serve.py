"""Training steps of one library, served in a process of its own, since some libraries patch the whole process.

    python -m benchmarks.harness.serve '{"variant": ..., "job": ..., "mode": ..., "folder": ..., "tree": ...}'
with the names of jobs.py, the folder of the checkpoints, and optionally a folder from which to import hasten. One JSON object a
line on stdin is a command; each is answered by one line on stdout:
    {"do": "warm", "steps": n}                  losses, first_s (the first step with all compilation), gradients (a sample)
    {"do": "run", "steps": n, "untimed": m}     losses of m + n steps, seconds of the last n and their peak_gib; for hasten
                                                also plan and predicted_gib
    {"do": "profile", "wall_s": s}              text, summary                  (see step_costs.py)
    {"do": "costs", "lengths": [...]}           host_waits, lengths            (see step_costs.py)
The first line, unasked, says that the model is loaded: import_s, load_s. An error is answered as {"error": ...} and ends the
process. The CUDA cache is emptied after every command, so that a waiting worker holds as little as possible.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import step_costs
from benchmarks.harness.jobs import JOBS
from benchmarks.harness.steps import Steps, load

ANSWERS = {"warm": Steps.warm, "run": Steps.run, "profile": step_costs.profile_step, "costs": step_costs.costs}


def main(variant: str, job: str, mode: str, folder: str, tree: str | None = None) -> None:
    """Loads, then answers each command. An error is reported and raised."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # from here on, libraries print to stderr

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=replies, flush=True)

    try:
        loaded, steps = load(variant, JOBS[job], mode, Path(folder), Path(tree) if tree else None)
        say(loaded)
        for line in sys.stdin:
            command = json.loads(line)
            reply = ANSWERS[command.pop("do")](steps, **command)
            torch.cuda.empty_cache()
            say(reply)
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"[:2000]})
        raise


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
