"""One call on a GPU machine: the GPU tests, parity, op speeds, training steps beside the peers, and one short table.

    python -m benchmarks.gpu --out FOLDER [--only tests,ops,train] [--jobs 8b-lora,...] [--variants hasten,transformers]
Full results go to FOLDER as JSON with the GPU's name and all versions.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

JOBS: dict[str, tuple[str, str, int, int]] = {
    "8b-lora": ("llama-8b", "lora", 4, 2048),
    "8b-qlora": ("llama-8b", "qlora", 4, 2048),
    "1b-lora": ("llama-1b", "lora", 8, 2048),
    "1b-full": ("llama-1b", "full", 8, 2048),
    "gemma-2b-qlora": ("gemma-2b", "qlora", 4, 2048),
    "command-r-qlora": ("command-r-slice", "qlora", 4, 2048),
}
PACKAGES = ["torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth", "trl", "accelerate"]


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {"gpu": torch.cuda.get_device_name(), **found}


def train(job: str, variant: str, recompute: bool, folder: Path, out: Path, profile: bool) -> dict[str, Any]:
    shape, kind, batch, length = JOBS[job]
    command = [
        sys.executable,
        "-m",
        "benchmarks.train_step",
        variant,
        shape,
        kind,
        str(batch),
        str(length),
        str(folder),
    ]
    command += ["--recompute"] if recompute else []
    label = f"{job}-{variant}{'-recompute' if recompute else ''}"
    command += ["--profile", str(out / f"profile-{label}.txt")] if profile else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=420)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return {"label": label, **json.loads(line.removeprefix("RESULT "))}
    (out / f"error-{label}.txt").write_text(done.stdout[-4000:] + done.stderr[-8000:])
    return {"label": label, "error": (done.stderr or done.stdout).strip().splitlines()[-1:]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="tests,ops,train")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--variants", default="hasten,transformers,liger,unsloth")
    parser.add_argument("--modes", default="keep,recompute")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / "checkpoints")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    parts, result = args.only.split(","), {"versions": versions()}
    if "tests" in parts:
        tests = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "tests/ops",
                "tests/families/test_kernels.py",
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
            ],
            capture_output=True,
            text=True,
        )
        (args.out / "tests.txt").write_text(tests.stdout[-20000:] + tests.stderr[-4000:])
        result["tests"] = tests.stdout.strip().splitlines()[-1]
        print("tests:", result["tests"], flush=True)
    if "ops" in parts:
        from benchmarks.op_speed import measure

        result["ops"] = measure()
        for row in result["ops"]:
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        torch.cuda.empty_cache()
    if "train" in parts:
        result["train"] = []
        for job in args.jobs.split(","):
            for mode in args.modes.split(","):
                for variant in args.variants.split(","):
                    row = train(job, variant, mode == "recompute", args.checkpoints, args.out, args.profile)
                    result["train"].append(row)
                    (args.out / "results.json").write_text(json.dumps(result, indent=1))
                    line = row.get("error") or (
                        f"{row['ms']:.0f} ms  {row['peak_gib']:.1f} GiB  first {row['first_step_s']:.1f} s  "
                        f"loss {row['losses'][0]:.4f} -> {row['losses'][-1]:.4f}"
                    )
                    print(f"{row['label']:40s} {line}", flush=True)
    (args.out / "results.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
