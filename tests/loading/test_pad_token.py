"""A pad token never adds a row: which one is taken, that EOS is still learned, and what an adapter and an export hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import hasten
from hasten import FastLanguageModel
from hasten.testing import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
"""PEFT warns of what these tests ask for on purpose."""

ROWS = 288
SPECIAL: dict[str, Any] = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def checkpoint(folder: Path, rows: int = ROWS, words: int = ROWS, **special: Any) -> Path:
    """A tiny llama whose tokenizer has `words` tokens: the special ones, then w0, w1, ..."""
    tiny_model("llama", pad_token_id=None, vocab_size=rows, num_hidden_layers=2).save_pretrained(folder)
    names = list(dict.fromkeys([*special.values()]))
    vocabulary = {word: index for index, word in enumerate([*names, *(f"w{i}" for i in range(words - len(names)))])}
    unknown = special.get("unk_token")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unknown or "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def load(folder: Path, **arguments: Any) -> tuple[Any, Any]:
    arguments = {"load_in_4bit": False, "dtype": torch.float32, "max_seq_length": 64, **arguments}
    return FastLanguageModel.from_pretrained(str(folder), **arguments)


KINDS: dict[str, tuple[dict[str, Any], str, str]] = {
    # special tokens, pad token afterwards, what the report says of it
    "unknown token": (SPECIAL, "<unk>", "the unknown token"),
    "unknown is EOS": ({"unk_token": "</s>", "bos_token": "<s>", "eos_token": "</s>"}, "</s>", "EOS"),
    "pad is EOS": ({**SPECIAL, "pad_token": "</s>"}, "<unk>", "the unknown token"),
    "one token is all": ({"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}, "<|endoftext|>", "EOS"),
    "reserved": (
        {**SPECIAL, "cls_token": "<|reserved_special_token_0|>"},
        "<|reserved_special_token_0|>",
        "vocabulary",
    ),
    "end of pretraining": ({"eos_token": "<|im_end|>", "sep_token": "<|endoftext|>"}, "<|endoftext|>", "vocabulary"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_of_a_default_run_fits_the_untouched_base_and_holds_only_lora(tmp_path: Path, kind: str) -> None:
    special, expected, said = KINDS[kind]
    base = checkpoint(tmp_path / "base", **special)
    model, tokenizer = load(base)
    assert tokenizer.pad_token == expected
    assert len(tokenizer) == ROWS and model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == ROWS
    line = next(line for line in str(hasten.report(model)).splitlines() if "pad token" in line)
    assert f"pad token: {expected}" in line and said in line
    model = FastLanguageModel.get_peft_model(model, r=2)
    model.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    with safe_open(weights, framework="pt") as file:
        assert all(".lora_A." in name or ".lora_B." in name for name in file.keys())  # noqa: SIM118
    lora = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert weights.stat().st_size < lora + 5000
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")


def test_spare_rows_are_left_alone(tmp_path: Path) -> None:
    """A vocabulary padded to a multiple of 64 has rows without a token; none is needed."""
    model, tokenizer = load(checkpoint(tmp_path / "base", rows=320, **SPECIAL))
    assert (tokenizer.pad_token, len(tokenizer), model.config.vocab_size) == ("<unk>", ROWS, 320)


def test_a_pad_token_without_a_row_is_replaced_and_stays_replaced(tmp_path: Path) -> None:
    """The tokenizer was given a pad token after training, and the model never got its row."""
    base = checkpoint(tmp_path / "base", **SPECIAL)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
    for folder in (base, tmp_path / "saved"):
        model, fixed = load(folder)
        assert (fixed.pad_token, model.config.vocab_size) == ("<unk>", ROWS)
        if folder == base:
            assert "[PAD], whose id 288 has no row" in str(hasten.report(model))
            model.save_pretrained_merged(folder.parent / "saved", fixed)


def test_an_adapter_that_was_trained_with_a_row_for_its_pad_token_still_loads(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", **SPECIAL)
    model, tokenizer = load(base, fix_tokenizer=False, resize_model_vocab=ROWS + 1)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = FastLanguageModel.get_peft_model(model, r=2)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again, fixed = load(tmp_path / "adapter")
    assert (fixed.pad_token, again.config.vocab_size) == ("[PAD]", ROWS + 1)


def test_the_users_own_pad_token_is_kept_and_exported(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", **SPECIAL, pad_token="w7")
    model, tokenizer = load(base)
    assert tokenizer.pad_token == "w7"
    model = FastLanguageModel.get_peft_model(model, r=2)
    model.save_pretrained_merged(tmp_path / "out", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "w7"
    recorded = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert recorded["pad_token_id"] == tokenizer.pad_token_id


@pytest.mark.parametrize("kind", ["unknown token", "unknown is EOS", "one token is all"])
def test_eos_is_learned_and_padding_is_not(tmp_path: Path, kind: str) -> None:
    """Through TRL, whose collator masks by position: the id of the pad token occurs in real text too."""
    from datasets import Dataset
    from trl import SFTTrainer

    model, tokenizer = load(checkpoint(tmp_path / "base", **KINDS[kind][0]))
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [[10, 11, pad, 12, eos], [20, 21, eos]]
    args = hasten.training.sft_config(model, output_dir=str(tmp_path), report_to=[], max_steps=1)
    model = FastLanguageModel.get_peft_model(model, r=2)
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_dict({"input_ids": rows}), processing_class=tokenizer)
    batch = trainer.data_collator([{"input_ids": row} for row in rows])
    assert batch["labels"].tolist() == [rows[0], [*rows[1], -100, -100]]
    assert batch["input_ids"][1].tolist() == [*rows[1], pad, pad]


@pytest.mark.parametrize("kind", ["unknown token", "unknown is EOS"])
def test_left_padded_batches_continue_as_alone(tmp_path: Path, kind: str) -> None:
    model, tokenizer = load(checkpoint(tmp_path / "base", **KINDS[kind][0]))
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    texts = ["w5 w6 w7 w8 w9 w10", "w20 w21"]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False).to(
        model.device
    )
    together = model.generate(**batch, **settings)[:, -6:]
    for text, found in zip(texts, together, strict=True):
        alone = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
        assert torch.equal(model.generate(**alone, **settings)[0, -6:], found)
