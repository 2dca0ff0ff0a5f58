"""The whole, valid files that cases start from, and what they give: made once, before any case runs."""

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cli_kit import write_job
from export_kit import train as stir
from peft import LoraConfig, get_peft_model

import hasten
from hasten import FastLanguageModel
from hasten.state import causal_lm_of
from hasten.testing import save_tiny

FAMILIES = ("llama", "gemma2", "qwen3")
IDS = torch.randint(6, 260, (1, 12), generator=torch.Generator().manual_seed(1))
TEXT = "some text, twice: some text"
CHAT = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True)
class Bases:
    """root: with a folder per family, `adapter` (on llama) and `job`."""

    root: Path

    def checkpoint(self, family: str) -> Path:
        return self.root / family

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def job(self) -> Path:
        return self.root / "job"

    def seen(self, name: str) -> dict[str, Any]:
        """What the unchanged files give."""
        return torch.load(self.root / f"{name}.pt", weights_only=False)


def make(root: Path) -> Bases:
    """Writes all files under `root`, in this process."""
    for family in FAMILIES:
        shards = "60KB" if family == "llama" else "5GB"
        save_tiny(
            root / family, family, num_hidden_layers=2, max_shard_size=shards, tie_word_embeddings=family == "gemma2"
        )
        torch.save(observe(*load(root / family)), root / f"{family}.pt")
    model, tokenizer = load(root / "llama")
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj", "down_proj"])
    )
    stir(model)
    model.save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    torch.save(observe(*load(root / "adapter")), root / "adapter.pt")
    (root / "job").mkdir()
    write_job(root / "job", train={"max_steps": 2, "assistant_only_loss": False})
    return Bases(root)


def load(folder: Path) -> tuple[Any, Any]:
    """By hasten, in fp32."""
    return FastLanguageModel.from_pretrained(
        str(folder), 64, torch.float32, load_in_4bit=False, use_gradient_checkpointing=False
    )


def observe(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Everything that a user sees of a loaded model: logits, text, ids, and the report's notes."""
    with torch.no_grad():
        logits = model.eval()(IDS).logits
    config, generation = causal_lm_of(model).config, causal_lm_of(model).generation_config
    return {
        "logits": logits,
        "new tokens": attempt(
            lambda: model.generate(IDS, max_new_tokens=3, do_sample=False, attention_mask=torch.ones_like(IDS)).tolist()
        ),
        "ids": attempt(lambda: tokenizer(TEXT)["input_ids"]),
        "text": attempt(lambda: tokenizer.decode(list(range(20)), skip_special_tokens=True)),
        "chat": attempt(lambda: tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)),
        "special": {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "ends": json.loads(json.dumps(generation.eos_token_id)),
        "sampling": (generation.temperature, generation.top_p, generation.top_k, generation.do_sample),
        "limit": getattr(config, "max_position_embeddings", None),
        "notes": notes(model) if hasattr(model, "for_inference") else [],
    }


def notes(model: Any) -> list[str]:
    """Lines of the report without paths, which differ from copy to copy."""
    return [line for line in hasten.report(model).notes if not line.startswith(("weights:", "adapter:"))]


def attempt(call: Any) -> Any:
    """The result, or the kind of exception: these calls are transformers' own, and are compared with it.

    A chat template of a hostile file may run for hours when a user renders it, which no loader can prevent.
    """

    def stop(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(8)
    try:
        return call()
    except hasten.HastenError:
        raise
    except Exception as error:  # noqa: BLE001 - recorded, and compared with what transformers raises
        return f"raises {type(error).__name__}"
    finally:
        signal.alarm(0)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs; notes aside."""
    found = []
    for name in one:
        if name in ("notes", "limit"):
            continue
        mine, theirs = one[name], other[name]
        if isinstance(mine, torch.Tensor):
            same = mine.shape == theirs.shape and torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            same = mine == theirs
        if not same:
            found.append(name)
    return found
