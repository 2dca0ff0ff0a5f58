"""From a dataset to what the model learns: packing, masks, padding, and the settings that `sft_config` makes."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from training_kit import apart, both, chats, curve, lora, sft, small, texts
from transformers import DataCollatorForLanguageModeling, TrainingArguments

from hasten.errors import InputError, OptionError, TrainingError
from hasten.patching import apply, plan
from hasten.state import causal_lm_of
from hasten.testing import tiny_model, tiny_tokenizer
from hasten.training import sft_config

PACKED = {
    "packing": {"packing": True, "max_length": 96, "per_device_train_batch_size": 1},
    "padding_free": {"padding_free": True, "max_length": None, "per_device_train_batch_size": 4},
}


def first_batch(trainer: Any) -> dict[str, torch.Tensor]:
    return dict(next(iter(trainer.get_train_dataloader())))


def documents(batch: dict[str, torch.Tensor]) -> list[slice]:
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["position_ids"].shape[1]]
    return [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def token_scores(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """(T,): what each token of a flattened batch costs as a label; zero where it is none."""
    out = model(**batch, fused_lm_head=True)
    return torch.cat([torch.zeros(1), -out.log_probs[0].detach()])


# gemma2's softcap is nothing that sdpa can do; cohere2 and mistral bring windows there.
BACKENDS = [("llama", "eager"), ("llama", "sdpa"), ("gemma2", "eager"), ("cohere2", "sdpa"), ("mistral", "sdpa")]


@pytest.mark.parametrize("how", PACKED)
@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize(("family", "attention"), BACKENDS)
def test_packed_documents_do_not_see_each_other(
    family: str, kind: str, how: str, attention: str, tmp_path: Path
) -> None:
    data = texts(8) if kind == "text" else chats(8)
    changes = {"layer_types": ["sliding_attention", "full_attention"]} if family == "cohere2" else {}
    model = small(family, True, lora(), attention=attention, **changes)
    batch = first_batch(sft(model, data, tmp_path, **PACKED[how]))
    parts = documents(batch)
    assert len(parts) >= 3 and max(p.stop - p.start for p in parts) > 16, "longer than the window of 8, and several"

    packed = token_scores(model, batch)
    for part in parts:
        ids, labels = batch["input_ids"][:, part], batch["labels"][:, part]
        alone = token_scores(model, {"input_ids": ids, "labels": labels})
        assert int((alone != 0).sum()) >= 3
        torch.testing.assert_close(packed[part], alone, rtol=1e-5, atol=1e-5)

    changed = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    first = parts[1]
    changed["input_ids"][0, first] = (changed["input_ids"][0, first] + 7) % 250 + 6
    again = token_scores(model, changed)
    assert not torch.equal(again[first], packed[first])
    assert torch.equal(again[: first.start], packed[: first.start])
    assert torch.equal(again[first.stop :], packed[first.stop :])


@pytest.mark.grid(1)
@pytest.mark.parametrize("how", PACKED)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_training_is_stocks(family: str, how: str, tmp_path: Path) -> None:
    stock, ours = both(
        lambda hasten: curve(sft(small(family, hasten, lora()), chats(8), tmp_path, max_steps=4, **PACKED[how]))
    )
    assert apart(ours, stock) < 1e-5


def test_assistant_only_loss_learns_exactly_the_assistant_turns(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    data = chats(6)
    trainer = sft(small("llama", True, lora()), data, tmp_path, assistant_only_loss=True, per_device_train_batch_size=6)
    assert len(trainer.train_dataset) == len(data)
    for prepared, chat in zip(trainer.train_dataset, data, strict=True):
        learned = [label for label in prepared["labels"] if label != -100]
        turns = [m["content"] + "<|end|>" for m in chat["messages"] if m["role"] == "assistant"]
        assert tokenizer.decode(learned) == "".join(turns) and len(turns) == 2
        assert prepared["input_ids"].count(tokenizer.bos_token_id) == 1
    stock, ours = both(
        lambda hasten: curve(sft(small("llama", hasten, lora()), data, tmp_path, assistant_only_loss=True, max_steps=3))
    )
    assert apart(ours, stock) < 1e-5


@pytest.mark.parametrize("pad", ["<|eos|>", "<|pad|>"])
def test_the_last_eos_is_learned_and_padding_is_not(pad: str, tmp_path: Path) -> None:
    """Also where padding and end have the same id, which a collator that masks by id gets wrong."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad
    model = small("llama", True, lora())
    trainer = sft(model, texts(4), tmp_path, {"processing_class": tokenizer})
    batch = first_batch(trainer)
    lengths = batch["attention_mask"].sum(1)
    assert int(lengths.min()) < batch["input_ids"].shape[1]
    for ids, labels, length in zip(batch["input_ids"], batch["labels"], lengths.tolist(), strict=True):
        assert ids[length - 1] == tokenizer.eos_token_id == labels[length - 1]
        assert bool((ids[length:] == tokenizer.pad_token_id).all()) and bool((labels[length:] == -100).all())
    masked_by_id = DataCollatorForLanguageModeling(tokenizer, mlm=False)(
        [{"input_ids": [7, 8, tokenizer.eos_token_id]}]
    )
    assert (masked_by_id["labels"][0, -1] == -100) == (pad == "<|eos|>"), "the trap is gone from transformers"


def limited(limit: int | None, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model("llama", num_hidden_layers=2, dtype=dtype)
    apply(model, plan(model, max_seq_length=limit))
    return model


def test_sft_config_takes_its_length_from_the_model(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert sft_config(limited(48), output_dir=folder).max_length == 48
    assert sft_config(limited(48), output_dir=folder, max_length=20).max_length == 20
    assert sft_config(limited(48), output_dir=folder, max_length=None).max_length is None
    assert sft_config(limited(48), output_dir=folder, packing=True).max_length == 48
    assert sft_config(limited(48), output_dir=folder, padding_free=True).max_length is None
    assert sft_config(limited(None), output_dir=folder).max_length is None
    with pytest.raises(OptionError, match="max_length=49.*max_seq_length=48"):
        sft_config(limited(48), output_dir=folder, max_length=49)
    with pytest.raises(OptionError, match="packing"):
        sft_config(limited(None), output_dir=folder, packing=True)
    with pytest.raises(TypeError, match="no_such_setting"):
        sft_config(limited(48), output_dir=folder, no_such_setting=1)


def test_sft_config_follows_the_models_dtype_and_checkpointing(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        plain = sft_config(limited(48), output_dir=folder)
    half = sft_config(limited(48, torch.bfloat16), output_dir=folder, use_cpu=True)
    asked = sft_config(limited(48), output_dir=folder, use_cpu=True, bf16=True, gradient_checkpointing=True)
    assert (plain.bf16, plain.fp16, plain.gradient_checkpointing) == (False, False, False)
    assert (half.bf16, half.fp16) == (True, False)
    assert (asked.bf16, asked.gradient_checkpointing) == (True, True)


@pytest.mark.parametrize(("split", "said"), [(False, True), (True, False)])
def test_sft_config_takes_one_gpu_of_many(
    split: bool, said: bool, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    model = limited(48)
    if split:
        model.lm_head.to("meta")
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda config: 2))
    assert sft_config(model, output_dir=str(tmp_path))._n_gpu == 1
    assert ("one of 2 GPUs" in caplog.text) is said


def test_batches_that_are_counted_for_several_gpus_are_refused() -> None:
    model = small("llama", True, lora())
    ids = torch.randint(6, 90, (2, 12))
    with pytest.raises(TrainingError, match="torchrun"):
        model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(22).unsqueeze(0).expand(2, -1))
    causal_lm_of(model)._is_replica = True  # as nn.DataParallel marks its copies
    with pytest.raises(TrainingError, match="torchrun"):
        model(input_ids=ids, labels=ids)
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss > 0


def test_rows_beyond_the_models_length_raise_instead_of_being_cut(tmp_path: Path) -> None:
    """TRL without our config cuts at its own default of 1024, or, told not to cut, meets the model's own check."""
    long = Dataset.from_list([{"text": "abcdefgh" * 10}] * 4)
    trainer = sft(limited(48), long, tmp_path, max_length=None)
    with pytest.raises(InputError, match="82 tokens.*max_seq_length=48"):
        trainer.train()
