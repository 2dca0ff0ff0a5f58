"""Tiny checkpoints, loads and training runs for the tests of the guarantees, and processes that start fresh.

`fresh` forks from a server that has imported the libraries and done nothing else: a fresh process without seconds of
imports. On a GPU it starts an interpreter: a process cannot use CUDA where its parent has asked how many GPUs there are,
which the imports do.
"""

import contextlib
import faulthandler
import json
import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from device_kit import DEVICE, ON_GPU
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer
from transformers_kit import exact_attention
from trl import SFTTrainer

from hasten import FastLanguageModel, sft_config

IDS = torch.randint(6, 260, (2, 20), generator=torch.Generator().manual_seed(1)).to(DEVICE)
PROMPTS = [IDS[0, :3], IDS[0], IDS[1, :9], IDS[1, :1], IDS[0, 5:17], IDS[1, :5], IDS[1], IDS[0, :8]]
SECONDS = 360 if ON_GPU else 120
"""That a fresh process may take. On a GPU each compiles kernels."""
PRELOADED = ["torch", "transformers", "peft", "trl", "datasets", "hasten.model", "hasten.training.job"]


def load(folder: Path | str, **options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) by hasten, in fp32 and without quantisation unless asked for."""
    plain = {} if any(name.startswith("load_in") for name in options) else {"load_in_4bit": False}
    defaults = {"max_seq_length": 64, "dtype": torch.float32, "use_gradient_checkpointing": False, **plain}
    return FastLanguageModel.from_pretrained(str(folder), **{**defaults, **options})


def adapted(folder: Path | str, adapter: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """(model with a LoRA, tokenizer)."""
    model, tokenizer = load(folder, **options)
    arguments = {"r": 4, "use_gradient_checkpointing": False, **(adapter or {})}
    return FastLanguageModel.get_peft_model(model, **arguments), tokenizer


def stock(folder: Path | str, **options: Any) -> Any:
    """The same checkpoint by plain transformers, in fp32, on the device of the tests."""
    options = {"dtype": torch.float32, **exact_attention(folder), **options}
    model = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    return model.eval().to(DEVICE)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """On the CPU, whatever the model's device."""
    return model.eval()(ids.to(model.device)).logits.float().cpu()


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of a Trainer's config for a short, silent run."""
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }


def trainer(model: Any, tokenizer: Any, data: Any, folder: Path, **changes: Any) -> SFTTrainer:
    """TRL's trainer on a hasten model, as the documentation has it."""
    extra = {name: changes.pop(name) for name in ("callbacks", "eval_dataset") if name in changes}
    config = sft_config(model, **settings(folder, **changes))
    return SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, **extra)


def losses(done: Trainer) -> torch.Tensor:
    return torch.tensor([entry["loss"] for entry in done.state.log_history if "loss" in entry], dtype=torch.float64)


def chats(count: int = 8) -> Dataset:
    """Conversations of two turns each side, of different lengths."""
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": f"q{i}" * (1 + i % 3)},
                    {"role": "assistant", "content": f"answer {i}"},
                    {"role": "user", "content": "more"},
                    {"role": "assistant", "content": "done" * (i % 2 + 1)},
                ]
            }
            for i in range(count)
        ]
    )


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def as_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def processes() -> Any:
    """The context of fresh processes."""
    if ON_GPU:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def fresh(*jobs: tuple[Callable[..., None], tuple[Any, ...]]) -> list[int]:
    """Exit codes of functions of a module, each run in a fresh process, all at once; negative = killed by that signal."""
    context = processes()
    started = [context.Process(target=_alone, args=job) for job in jobs]
    for process in started:
        process.start()
    for process in started:
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in started]


def _alone(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(SECONDS - 20, exit=True)  # says where a process hangs, before it is killed
    function(*arguments)


class Peak:
    """bytes: anonymous memory that was held at most, above what was held before."""

    bytes = 0


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watches this process from a thread, every millisecond."""
    before, peak, done = anonymous(), Peak(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak.bytes = max(peak.bytes, anonymous() - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def anonymous() -> int:
    """Bytes of memory of this process that no file is mapped into."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
