"""Judges of mutated files: refused with an error of hasten's own, or the same as before, or as transformers, or reported."""

import contextlib
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from campaign_bases import FAMILIES, Bases, differences, load, observe
from campaign_mutate import change_json, change_json_file, change_safetensors, change_text
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten import FastLanguageModel
from hasten.training.config import Job, read_job
from hasten.training.job import run

MUST_BE_POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "sliding_window", "r", "lora_alpha",
)  # fmt: skip
FORWARDS = 2
"""Batches that a job with mutated settings trains on before it is stopped."""


def judge_config(bases: Bases, seed: int, scratch: Path) -> tuple[str, str, str]:
    """config.json of one of three families."""
    rng = random.Random(f"config/{seed}")
    family = FAMILIES[seed % len(FAMILIES)]
    folder = Path(shutil.copytree(bases.checkpoint(family), scratch / "model"))
    what = change_json_file(folder / "config.json", rng)
    return judge_checkpoint(
        bases, family, folder, scratch, f"{family}: {what}", _impossible(folder, bases.checkpoint(family))
    )


def _impossible(folder: Path, original: Path) -> bool:
    """Whether config.json says what no model can be, or leaves out layers that the weights hold."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
        whole = json.loads((original / "config.json").read_text())
        values = [config[name] for name in MUST_BE_POSITIVE if name in config and config[name] != whole.get(name)]
        wrong = [v for v in values if isinstance(v, int | float) and not (math.isfinite(v) and v > 0)]
        layers = config.get("num_hidden_layers", whole["num_hidden_layers"])
        return bool(wrong) or (isinstance(layers, int) and layers < whole["num_hidden_layers"])
    except (ValueError, TypeError, AttributeError, RecursionError):
        return False


def judge_weights(bases: Bases, seed: int, scratch: Path) -> tuple[str, str, str]:
    """Shards of a checkpoint, and the index that lists them."""
    rng = random.Random(f"weights/{seed}")
    family = FAMILIES[seed % len(FAMILIES)]
    folder = Path(shutil.copytree(bases.checkpoint(family), scratch / "model"))
    index = folder / "model.safetensors.index.json"
    if index.exists() and rng.random() < 0.3:
        what, damaged = change_json_file(index, rng), False
    else:
        what, damaged = change_safetensors(rng.choice(sorted(folder.glob("*.safetensors"))), rng)
    return judge_checkpoint(bases, family, folder, scratch, f"{family}: {what}", damaged)


def judge_tokenizer(bases: Bases, seed: int, scratch: Path) -> tuple[str, str, str]:
    """Tokenizer files, chat template and generation config."""
    rng = random.Random(f"tokenizer/{seed}")
    family = FAMILIES[seed % len(FAMILIES)]
    folder = Path(shutil.copytree(bases.checkpoint(family), scratch / "model"))
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    )
    path = folder / rng.choice(names)
    if path.suffix == ".json":
        what = change_json_file(path, rng)
    else:
        template = path.read_text()
        hostile = (
            "{% for i in range(10**9) %}x{% endfor %}",
            "{{ 'x' * 10**10 }}",
            "{{ ''.__class__.__mro__ }}",
            "{% for m in messages %}{{ m.content }}",
            "{{ messages[5].content }}",
            "{{ raise_exception('no') }}",
            "",
            template.replace("message", "massage"),
            template.replace("add_generation_prompt", "nothing"),
            template + "{{ '<|eos|>' }}",
        )
        chosen = rng.randrange(len(hostile))
        path.write_text(hostile[chosen])
        what = f"{path.name}: template {chosen}"
    return judge_checkpoint(bases, family, folder, scratch, f"{family}: {what}", False)


def judge_checkpoint(
    bases: Bases, name: str, folder: Path, scratch: Path, what: str, damaged: bool
) -> tuple[str, str, str]:
    """Loads a mutated checkpoint and compares all that a user sees of it."""
    (scratch / "what.txt").write_text(what, encoding="utf-8")
    found = observe(*load(folder))
    return judge(found, bases.seen(name), lambda: _stock(folder), what, damaged)


def _stock(folder: Path) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return observe(model, AutoTokenizer.from_pretrained(folder))


def judge(
    found: dict[str, Any], before: dict[str, Any], stock: Callable[[], dict[str, Any]], what: str, damaged: bool
) -> tuple[str, str, str]:
    """damaged: the change cannot be meant, so that it must not pass unseen, whatever transformers does with it."""
    new = [note for note in found["notes"] if note not in before["notes"]]
    changed = differences(found, before)
    if not changed:
        return "no effect", what, ""
    told = f"{', '.join(changed)}; new in the report: {new}"
    if damaged:
        return ("reported" if new else "silent difference"), what, told
    try:
        theirs = stock()
    except Exception as error:  # noqa: BLE001 - whatever transformers raises for a file that it does not take
        return ("reported" if new else "silent difference"), what, f"{told}; transformers raises {type(error).__name__}"
    apart = differences(found, theirs)
    if not apart:
        return "as stock", what, ", ".join(changed)
    return ("reported" if new else "silent difference"), what, f"unlike transformers in {', '.join(apart)}; {told}"


def judge_adapter(bases: Bases, seed: int, scratch: Path) -> tuple[str, str, str]:
    """adapter_config.json and adapter_model.safetensors of a LoRA."""
    rng = random.Random(f"adapter/{seed}")
    folder = Path(shutil.copytree(bases.adapter, scratch / "adapter"))
    if rng.random() < 0.5:
        what, damaged = change_json_file(folder / "adapter_config.json", rng), False
    else:
        what, damaged = change_safetensors(folder / "adapter_model.safetensors", rng)
    (scratch / "what.txt").write_text(what, encoding="utf-8")
    found = observe(*load(folder))

    def stock() -> dict[str, Any]:
        base = AutoModelForCausalLM.from_pretrained(bases.checkpoint("llama"), dtype=torch.float32)
        return observe(PeftModel.from_pretrained(base, str(folder)), AutoTokenizer.from_pretrained(folder))

    return judge(found, bases.seen("adapter"), stock, what, damaged)


class Stopped(Exception):  # noqa: N818 - no error
    """The job trains: enough was seen."""


def judge_job(bases: Bases, seed: int, scratch: Path) -> tuple[str, str, str]:
    """A job file. One that is accepted trains on two batches, and every value in it is of the kind that its field takes."""
    rng = random.Random(f"job/{seed}")
    folder = Path(shutil.copytree(bases.job, scratch / "job"))
    path = folder / "job.yaml"
    before = read_job(path)
    document = yaml.safe_load(path.read_text())
    where: tuple[Any, ...] = ()
    value: Any = None
    if rng.random() < 0.25:
        raw, what = change_text(path.read_bytes(), rng)
        path.write_bytes(raw)
    else:
        changed, what, where, value = change_json(document, rng)
        path.write_text(yaml.safe_dump(changed), encoding="utf-8")
    (scratch / "what.txt").write_text(what, encoding="utf-8")
    job = read_job(path)
    wrong = taken_for_another(before, job, where, value) if len(where) == 2 else ""

    def adapt(model: Any, **options: Any) -> Any:
        peft = FastLanguageModel.get_peft_model(model, **options)
        seen: list[int] = []

        def count(*_: Any) -> None:
            seen.append(1)
            if len(seen) > FORWARDS:
                raise Stopped

        peft.register_forward_pre_hook(count)
        return peft

    with contextlib.suppress(Stopped):
        run(job, FastLanguageModel.from_pretrained, adapt)
    if wrong:
        return "silent difference", what, wrong
    return ("no effect" if job == before else "as stock"), what, "trains"


def is_number(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False


def taken_for_another(before: Job, job: Job, where: tuple[Any, ...], value: Any) -> str:
    """Why a changed key was not taken for what it says: dropped, or kept as a value of another type than its field's."""
    section, name = where
    sections = [getattr(one, section, None) for one in (before, job)]
    old, new = (s.get(name) if hasattr(s, "get") else getattr(s, name, None) for s in sections)
    numbers = isinstance(old, int | float) and not isinstance(old, bool)
    if old is None or new is None:
        return ""
    right = isinstance(new, int | float) and not isinstance(new, bool) if numbers else isinstance(new, type(old))
    if not right:
        return f"{section}.{name} = {new!r} is accepted, where {old!r} was"
    if numbers and not math.isfinite(new):
        return f"{section}.{name} = {new!r} is accepted"
    if numbers and isinstance(value, str) and is_number(value, new):
        return ""  # 1e-2, which a YAML file holds without quotes
    if value is not None and new == old and value != old and str(value) not in str(new):
        return f"{section}.{name} = {value!r} is dropped for {old!r}"
    return ""
