"""Foreign files with faults: each ends in a typed error, or in a load whose logits are those of stock transformers."""

import copy
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mutate import mutated_json, mutated_safetensors
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hasten.errors import HastenError
from hasten.loading import load
from hasten.loading.adapter import attach
from hasten.options import LoadOptions
from hasten.testing import save_tiny, tiny_model, tiny_tokenizer

IDS = torch.tensor([[1, 9, 30, 77, 100]])
SECONDS = 20
FILES = {
    "config.json": 60,
    "generation_config.json": 20,
    "tokenizer.json": 30,
    "tokenizer_config.json": 20,
    "model.safetensors.index.json": 10,
    "model-00001-of-00003.safetensors": 30,
}
"""File -> number of mutations."""


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises AssertionError where the block takes longer."""

    def late(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers in three shards, its tokenizer without a chat template."""
    folder = save_tiny(tmp_path_factory.mktemp("sharded"), num_hidden_layers=2, max_shard_size="200KB")
    tiny_tokenizer(None).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert (folder / "model-00001-of-00003.safetensors").is_file()
    return folder


@pytest.fixture(scope="module")
def adapter(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(sharded), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(folder)
    return folder


def mutations(file: Path, count: int) -> Iterator[tuple[int, bytes]]:
    for seed in range(count):
        chance = random.Random(f"{file.name} {seed}")
        if file.suffix == ".json":
            yield seed, mutated_json(file.read_text(), chance)
        else:
            yield seed, mutated_safetensors(file.read_bytes(), chance)


def outcome(ours: Callable[[], torch.Tensor], stock: Callable[[], torch.Tensor]) -> str:
    """Returns "refused" or "equal", else what went wrong."""
    try:
        with within(SECONDS):
            found = ours()
    except HastenError as error:
        return "refused" if len(str(error)) < 20_000 else "an error of more than 20,000 characters"
    except BaseException as error:  # noqa: BLE001 every one is a fault of the reader, PanicException included
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:500]}"
    return "equal" if torch.equal(found, stock()) else "other logits"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", FILES)
def test_a_mutated_file_is_refused_or_loads_as_stock(name: str, sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    options = LoadOptions(
        model_name=str(folder), max_seq_length=64, load_in_4bit=False, dtype=torch.float32, device_map="cpu"
    )
    outcomes = {}
    for seed, content in mutations(sharded / name, FILES[name]):
        (folder / name).write_bytes(content)
        outcomes[f"seed {seed}: {content[:3000]!r}"] = outcome(
            lambda: logits(load(options).model),
            lambda: logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)),
        )
    assert {c: found for c, found in outcomes.items() if found not in ("refused", "equal")} == {}
    assert "refused" in outcomes.values()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_mutated_adapter_is_refused_or_attached_as_by_peft(name: str, adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "copy"))
    base = tiny_model("llama", num_hidden_layers=2)
    outcomes = {}
    for seed, content in mutations(adapter / name, 25):
        (folder / name).write_bytes(content)
        outcomes[f"seed {seed}: {content[:3000]!r}"] = outcome(
            lambda: logits(attach(copy.deepcopy(base), folder)),
            lambda: logits(PeftModel.from_pretrained(copy.deepcopy(base), str(folder))),
        )
    assert {c: found for c, found in outcomes.items() if found not in ("refused", "equal")} == {}
    assert "refused" in outcomes.values()
