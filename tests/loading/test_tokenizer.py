"""The tokenizer's fixes, and that nothing else about it changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hasten.loading import Loaded, load
from hasten.loading.tokenizer import plan_fixes
from hasten.options import LoadOptions
from hasten.testing import tiny_tokenizer

Copy = Callable[[Path], Path]
TEXT = "def f(x): return x"


def changed(folder: Path, change: Callable[[Any], None]) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, **arguments: Any) -> Loaded:
    arguments = {"max_seq_length": 64, "load_in_4bit": False, "dtype": torch.float32, **arguments}
    return load(LoadOptions.from_call(model_name=str(folder), **arguments))


def notes(result: Loaded) -> str:
    return "\n".join(result.notes)


def left_padded(folder: Path) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    return folder


def no_pad(tokenizer: Any) -> None:
    tokenizer.pad_token = None


def test_a_good_tokenizer_stays_as_it_is(llama: Path, tmp_path: Path) -> None:
    result = loaded(llama)
    result.tokenizer.save_pretrained(tmp_path)
    stock = AutoTokenizer.from_pretrained(llama)
    stock.save_pretrained(tmp_path / "stock")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        ours, theirs = (tmp_path / name).read_text(), (tmp_path / "stock" / name).read_text()
        assert ours == theirs if name.endswith("jinja") else _without_name(ours) == _without_name(theirs)
    assert "pad token" not in notes(result)
    assert result.tokenizer(TEXT).input_ids == stock(TEXT).input_ids
    assert result.tokenizer(TEXT).input_ids.count(stock.bos_token_id) == 1


def _without_name(text: str) -> dict:
    return {k: v for k, v in json.loads(text).items() if k not in ("name_or_path", "padding_side", "local_files_only")}


@pytest.mark.parametrize("pad", [None, "<|eos|>", "<|bos|>"])
def test_a_pad_token_of_its_own_from_the_vocabulary(llama: Path, copy_of: Copy, pad: str | None) -> None:
    folder = changed(copy_of(llama), lambda t: setattr(t, "pad_token", pad))
    result = loaded(folder)
    assert result.tokenizer.pad_token == "<|pad|>"
    assert result.model.config.vocab_size == 288
    assert "pad token: <|pad|> (in the vocabulary)" in notes(result)
    ids = {holder.pad_token_id for holder in (result.tokenizer, result.model.config, result.model.generation_config)}
    assert ids == {result.tokenizer.get_vocab()["<|pad|>"]}


def test_eos_pads_where_no_token_can_be_spared(llama: Path, copy_of: Copy) -> None:
    folder = copy_of(llama)
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("<|pad|>", "plainword"))
    config = json.loads((folder / "config.json").read_text())
    config["pad_token_id"] = None
    (folder / "config.json").write_text(json.dumps(config))
    changed(folder, lambda t: (no_pad(t), t.add_tokens([f"<t{i}>" for i in range(288 - len(t))])))
    assert len(AutoTokenizer.from_pretrained(folder)) == 288
    result = loaded(folder)
    assert (result.tokenizer.pad_token, len(result.tokenizer)) == (result.tokenizer.eos_token, 288)
    assert result.model.config.vocab_size == result.model.lm_head.weight.shape[0] == 288
    assert "pad token: <|eos|> (EOS, as no other token can be spared; labels must be masked by position" in notes(
        result
    )


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["<unused7>", "<unused3>"], "<unused7>"),
        (["<|reserved_special_token_5|>"], "<|reserved_special_token_5|>"),
        (["<|vision_pad|>", "[PAD]"], "[PAD]"),
        (["<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>"),
        (["<|extra_0|>"], "<|extra_0|>"),
        (["<SPECIAL_20>", "[control_8]"], "<SPECIAL_20>"),
        (["[UNUSED_TOKEN_145]"], "[UNUSED_TOKEN_145]"),
        (["<|placeholder1|>", "<|endoftext|>"], "<|placeholder1|>"),
        (["<|endoftext|>"], "<|endoftext|>"),
        (["<|padded|>", "lpad", "pad"], "<|pad|>"),  # EOS in this test
    ],
)
def test_which_token_becomes_the_pad_token(names: list[str], chosen: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.eos_token = "<|pad|>"
    tokenizer.add_tokens(names)
    plan = plan_fixes(tokenizer, rows=400, eos_ids=[], pad_id=None)
    assert plan.pad == chosen
    assert plan.rows_needed == len(tokenizer)
    assert ("EOS" in plan.notes[0].split("; it was")[0]) == (chosen == tokenizer.eos_token)


def test_tokens_that_end_rows_or_stand_in_the_template_are_not_taken() -> None:
    tokenizer = tiny_tokenizer(chat_template="{{ '<unused0>' }}{{ messages }}")
    tokenizer.pad_token = None
    tokenizer.add_tokens(["<unused0>", "<unused1>", "<unused2>", "<unused3>"])
    ids = tokenizer.get_vocab()
    stops = [ids["<|pad|>"], ids["<unused1>"]]
    assert plan_fixes(tokenizer, 400, stops, None).pad == "<unused2>"
    assert plan_fixes(tokenizer, 400, stops, ids["<unused3>"]).pad == "<unused3>"
    assert plan_fixes(tokenizer, ids["<unused0>"], stops, None).pad == tokenizer.eos_token  # the others have no row


def test_ids_agree_and_lists_of_stops_are_kept(llama: Path, copy_of: Copy) -> None:
    folder = copy_of(llama)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 99, "bos_token_id": 98}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, 99], "temperature": 0.5, "do_sample": True})
    )
    result = loaded(folder)
    assert (result.model.config.eos_token_id, result.model.config.bos_token_id) == (2, 1)
    assert result.model.generation_config.eos_token_id == [2, 5, 99]
    assert result.model.generation_config.temperature == 0.5
    assert "config: eos_token_id is 2, as the tokenizer's; it was 99" in notes(result)


def test_padding_is_on_the_right_and_said(llama: Path, copy_of: Copy) -> None:
    result = loaded(left_padded(copy_of(llama)))
    assert result.tokenizer.padding_side == "right"
    assert "padding side: right" in notes(result)


def test_added_tokens_grow_the_embedding(llama: Path, copy_of: Copy) -> None:
    folder = changed(copy_of(llama), lambda t: t.add_tokens([f"<t{i}>" for i in range(40)]))
    result = loaded(folder)
    needed = len(result.tokenizer)
    assert needed > 288
    assert result.model.get_input_embeddings().weight.shape[0] == result.model.config.vocab_size == needed
    assert f"vocabulary: {needed} rows" in notes(result)


def test_false_leaves_everything_untouched(llama: Path, copy_of: Copy) -> None:
    folder = left_padded(changed(copy_of(llama), lambda t: setattr(t, "pad_token", t.eos_token)))
    result = loaded(folder, fix_tokenizer=False)
    assert result.tokenizer.pad_token == result.tokenizer.eos_token
    assert result.tokenizer.padding_side == "left"
    assert result.model.config.to_dict() | {"dtype": 0} == AutoModelForCausalLM.from_pretrained(
        folder
    ).config.to_dict() | {"dtype": 0}


def test_model_max_length_is_the_tokenizers_own(llama: Path) -> None:
    assert loaded(llama).tokenizer.model_max_length == AutoTokenizer.from_pretrained(llama).model_max_length


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "add_generation_prompt adds nothing"),
        ("{{ raise_exception('system first') }}", "cannot render"),
        ("{{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}", None),
        (None, None),
    ],
)
def test_chat_templates_without_generation_prompt_are_reported(template: str | None, said: str | None) -> None:
    found = plan_fixes(tiny_tokenizer(template), 288, [], None).notes
    assert found == [] if said is None else said in found[0]
