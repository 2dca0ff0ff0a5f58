"""Guarantees of what is written: merged models, adapters, tokenizers."""

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export_kit import contents, fresh_logits, tensors
from export_kit import train as stir
from guarantee_kit import IDS, adapted, as_json, chats, fresh, load, logits, peak_memory, read, same, stock, trainer
from peft import PeftModel
from transformers import AutoTokenizer

from hasten.errors import CheckpointError, ExportError, OptionError
from hasten.testing import save_tiny, tiny_tokenizer
from hasten.training.config import read_job


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def test_r01_a_merged_model_is_the_trained_model(llama: Path, tmp_path: Path) -> None:
    """A merged model answers in a fresh process as the adapter on the 16-bit base does, and only adapted tensors differ from it."""
    model, tokenizer = adapted(llama, {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 6})
    stir(model)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    model.save_pretrained_merged(tmp_path / "adapter", tokenizer, save_method="lora")
    trained, merged = fresh_logits([(llama, tmp_path / "adapter"), tmp_path / "merged"], tmp_path, IDS)
    assert torch.equal(merged.argmax(-1), trained.argmax(-1)) and close(merged, trained)
    assert not close(trained, logits(stock(llama)), 0.01)
    base, adapter, found = read(llama), read(tmp_path / "adapter"), tensors(tmp_path / "merged")
    assert base.keys() == found.keys()
    for name, weight in base.items():
        part = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{part}.lora_A.weight" in adapter:
            delta = 6 / 4 * adapter[f"{part}.lora_B.weight"] @ adapter[f"{part}.lora_A.weight"]
            torch.testing.assert_close(found[name], weight + delta, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(found[name], weight), name
    before = contents(tmp_path / "merged")
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert contents(tmp_path / "merged") == before


def test_r02_the_format_on_disk_is_the_one_asked_for(llama: Path, tmp_path: Path) -> None:
    """The three exports (16-bit merge, requantised merge, adapter) write what they are named after; other names are refused."""
    model, tokenizer = adapted(llama, dtype=torch.bfloat16)
    stir(model)
    folders = {None: "default", "merged_16bit": "dense", "merged_4bit": "packed", "lora": "adapter"}
    done = {}
    for method, name in folders.items():
        asked = {} if method is None else {"save_method": method}
        done[method] = model.save_pretrained_merged(tmp_path / name, tokenizer, **asked)
    assert contents(tmp_path / "default") == contents(tmp_path / "dense")
    assert "quantization_config" not in as_json(tmp_path / "dense/config.json")
    assert {t.dtype for t in read(tmp_path / "dense").values()} == {torch.float32}, "the base's own dtype"
    assert as_json(tmp_path / "packed/config.json")["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    packed = read(tmp_path / "packed")["model.layers.0.mlp.up_proj.weight"]
    assert packed.dtype == torch.uint8 and packed.numel() == 64 * 128 // 2
    assert done["merged_4bit"].kl is not None and 0 < done["merged_4bit"].kl < float("inf")
    assert not (tmp_path / "adapter/config.json").exists()
    with pytest.raises(ExportError, match="merged_16bit, merged_4bit, lora"):
        model.save_pretrained_merged(tmp_path / "other", tokenizer, save_method="merged_8bit")
    assert not (tmp_path / "other").exists()


def test_r06_saving_keeps_eos_pad_and_chat_template(llama: Path, tmp_path: Path) -> None:
    """Loading and saving leaves tokenizer, chat template and generation config as they were."""
    folder = Path(shutil.copytree(llama, tmp_path / "base"))
    (folder / "generation_config.json").write_text(
        '{"eos_token_id": [2, 5], "pad_token_id": 0, "temperature": 0.5, "do_sample": true}'
    )
    model, tokenizer = adapted(folder)
    model.save_pretrained_merged(tmp_path / "out", tokenizer)
    assert (tmp_path / "out/chat_template.jinja").read_text() == (folder / "chat_template.jinja").read_text()
    assert as_json(tmp_path / "out/tokenizer.json") == as_json(folder / "tokenizer.json")
    before, after = (AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "out"))
    assert before.special_tokens_map == after.special_tokens_map
    generation = as_json(tmp_path / "out/generation_config.json")
    assert generation["eos_token_id"] == [2, 5] and generation["temperature"] == 0.5 and generation["do_sample"] is True
    assert generation["pad_token_id"] == 0 and generation["pad_token_id"] not in generation["eos_token_id"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("how", ["LoRA", "embed_tokens", "both", "frozen"])
def test_r14_tied_embeddings_survive_training_and_merging(tied: bool, how: str, tmp_path: Path) -> None:
    """Trained embeddings and heads, tied or not, are in the merged model; a tied pair is written once, and the config says so."""
    folder = save_tiny(tmp_path / "base", "llama", tie_word_embeddings=tied)
    extra = {"LoRA": ["lm_head"] if not tied else [], "embed_tokens": ["embed_tokens"], "frozen": []}
    targets = ["q_proj", *extra.get(how, ["embed_tokens", "lm_head"])]
    model, tokenizer = adapted(folder, {"target_modules": targets})
    stir(model)
    named = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(any(target in name for name in named) for target in targets if not (tied and target == "lm_head"))
    wanted = logits(model)
    model.save_pretrained_merged(tmp_path / "out", tokenizer)
    assert close(logits(stock(tmp_path / "out")), wanted)
    saved, config = read(tmp_path / "out"), as_json(tmp_path / "out/config.json")
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in saved)
    assert config["tie_word_embeddings"] == tied


def test_r15_added_tokens_survive_and_train(tmp_path: Path) -> None:
    """Added tokens get rows, train, and come back with the same values; a vocabulary with spare rows never shrinks."""
    folder = save_tiny(tmp_path / "base", "llama", vocab_size=300)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(60)])
    tokenizer.save_pretrained(folder)
    model, tokenizer = adapted(folder, {"target_modules": ["q_proj", "embed_tokens"]})
    rows = len(tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == rows > 300
    before = model.get_input_embeddings().weight.detach().clone()
    stir(model)
    model.save_pretrained_merged(tmp_path / "out", tokenizer)
    again, reloaded = load(tmp_path / "out")
    table = again.get_input_embeddings().weight
    assert torch.equal(table, model.get_input_embeddings().weight) and len(reloaded) == rows
    assert (table[300:] != before[300:]).any(dim=1).all()
    assert reloaded("<new7>").input_ids[-1] == tokenizer.convert_tokens_to_ids("<new7>")
    spare = save_tiny(tmp_path / "spare", "llama", vocab_size=400)
    kept, _ = load(spare)
    assert kept.get_input_embeddings().weight.shape[0] == kept.config.vocab_size == 400


def test_r23_gguf_is_refused_before_training_and_the_merge_is_there(llama: Path, tmp_path: Path) -> None:
    """No export builds a converter at the end of a run: what cannot be written is refused before training, and the 16-bit merge is."""
    (tmp_path / "job.yaml").write_text("model: {model_name: base}\ndata: {path: rows.jsonl}\nsave: {method: gguf}\n")
    with pytest.raises(OptionError, match="merged_16bit"):
        read_job(tmp_path / "job.yaml")
    model, tokenizer = adapted(llama)
    with pytest.raises(ExportError, match="gguf.*merged_16bit"):
        model.save_pretrained_merged(tmp_path / "gguf", tokenizer, save_method="gguf")
    assert not (tmp_path / "gguf").exists()
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert as_json(tmp_path / "merged/config.json")["model_type"] == "llama"


def _merge_and_die(base: Path, target: Path, shard: int) -> None:
    """Killed without warning when the merge opens its `shard`-th file to write."""
    count = itertools.count(1)

    def watch(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wx")
        if writes and str(target.parent) in str(args[0]) and next(count) >= shard:
            os.kill(os.getpid(), signal.SIGKILL)

    model, tokenizer = adapted(base)
    sys.addaudithook(watch)
    model.save_pretrained_merged(target, tokenizer, max_shard_size="60KB")


def test_r24_a_merge_is_whole_or_nothing(llama: Path, tmp_path: Path) -> None:
    """A killed merge leaves nothing that looks like a model, the next one clears it away, and the index lists every tensor once."""
    home = tmp_path / "home"
    home.mkdir()
    jobs = [(_merge_and_die, (llama, home / f"out{number}", number)) for number in (1, 2, 4)]
    assert fresh(*jobs) == [-signal.SIGKILL] * 3
    for left in home.iterdir():
        assert left.name not in {"out1", "out2", "out4"} and not (left / "config.json").exists()
    model, tokenizer = adapted(llama)
    for number in (1, 2, 4):
        model.save_pretrained_merged(home / f"out{number}", tokenizer, max_shard_size="60KB")
    assert {path.name for path in home.iterdir()} == {"out1", "out2", "out4"}
    assert len(tensors(home / "out1")) == 4 * 9 + 3, "export_kit holds the index against the shards"


def _measure_merge(base: Path, target: Path, shard: int) -> None:
    """Exits with the peak of a merge above the model, in tenths of a shard, plus 2 (1 = an exception)."""
    model, tokenizer = adapted(base, {"target_modules": ["q_proj"]})
    model.save_pretrained_merged(target / "warm", tokenizer, max_shard_size=shard)
    with peak_memory() as peak:
        model.save_pretrained_merged(target / "out", tokenizer, max_shard_size=shard)
    sys.exit(min(255, 2 + 10 * peak.bytes // shard))


def test_r24_a_merge_needs_less_than_two_shards_of_memory(tmp_path: Path) -> None:
    """A merge holds less than two shards in memory, whatever the size of the model."""
    sizes = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 6, "head_dim": 64}
    base = save_tiny(tmp_path / "base", "llama", max_shard_size="16MB", **sizes)
    assert sum(path.stat().st_size for path in base.glob("*.safetensors")) > 5 * 16e6
    (code,) = fresh((_measure_merge, (base, tmp_path, 16 * 10**6)))
    assert 2 <= code < 22, f"{(code - 2) / 10} shards, or an exception"


def test_r25_every_artefact_loads_everywhere(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each folder that hasten writes is read again by hasten, by plain transformers and by PEFT, from relative and absolute paths."""
    model, tokenizer = adapted(llama)
    stir(model)
    wanted = logits(model)
    for method in ("merged_16bit", "merged_4bit", "lora"):
        model.save_pretrained_merged(tmp_path / "at" / method, tokenizer, save_method=method)
    monkeypatch.chdir(tmp_path)
    for name in (
        "at/merged_16bit",
        "at/lora",
        str(tmp_path / "at/merged_16bit"),
        str(tmp_path / "at/lora"),
        "./at/lora",
    ):
        again, reloaded = load(name)
        assert close(logits(again), wanted) and reloaded.chat_template == tokenizer.chat_template
    assert close(logits(stock("at/merged_16bit")), wanted)
    assert close(logits(PeftModel.from_pretrained(stock(llama), "at/lora")), wanted)
    packed, _ = load("at/merged_4bit", load_in_4bit=True)
    assert torch.equal(logits(packed), logits(packed)) and not close(logits(packed), wanted, 1e-4)
    with pytest.raises(CheckpointError, match="nothing"):
        load("at\\merged_16bit")


def test_r26_training_and_serving_use_one_template(plain: Path, tmp_path: Path) -> None:
    """The ids that a chat is trained on are those that the saved tokenizer renders it to."""
    model, tokenizer = adapted(plain)
    prepared = trainer(model, tokenizer, chats(), tmp_path).train_dataset
    model.save_pretrained_merged(tmp_path / "out", tokenizer)
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    for row, chat in zip(prepared, chats(), strict=True):
        assert list(row["input_ids"]) == saved.apply_chat_template(chat["messages"], return_dict=True)["input_ids"]


def test_r34_nothing_is_substituted(llama: Path, tmp_path: Path) -> None:
    """The report names what was loaded, an adapter records it, and a base that is gone is an error and not another model."""
    import hasten

    base = Path(shutil.copytree(llama, tmp_path / "base"))
    model, tokenizer = adapted(base)
    assert f"weights: {base}" in str(hasten.report(model))
    model.save_pretrained_merged(tmp_path / "adapter", tokenizer, save_method="lora")
    assert as_json(tmp_path / "adapter/adapter_config.json")["base_model_name_or_path"] == str(base)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="base"):
        load(tmp_path / "adapter")
    assert same(read(tmp_path / "elsewhere"), read(llama))
