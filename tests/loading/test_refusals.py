"""What cannot be done is refused in one error, before any weight is read."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kit import poison
from transformers import AutoTokenizer

from hasten.errors import CheckpointError, HastenError, MissingExtraError, OptionError, TokenizerError
from hasten.loading import load
from hasten.options import LoadOptions
from hasten.testing import save_tiny, tiny_tokenizer

Copy = Callable[[Path], Path]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that are refused once they are read, as that of `gemma`."""
    return poison(save_tiny(tmp_path_factory.mktemp("llama"), "llama"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poison(save_tiny(tmp_path_factory.mktemp("gemma"), "gemma"))


def refusal(kind: type[HastenError], folder: Path | str, **arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        load(LoadOptions.from_call(model_name=str(folder), **{"max_seq_length": 64, **arguments}))
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.parametrize("in_4bit", [False, True])
def test_weights_that_are_read_are_noticed_here(llama: Path, in_4bit: bool) -> None:
    assert "NaN" in refusal(CheckpointError, llama, load_in_4bit=in_4bit, device_map="cpu")


def test_five_faults_of_three_kinds_are_listed_together(gemma: Path, copy_of: Copy) -> None:
    folder = copy_of(gemma)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    said = refusal(
        OptionError,
        folder,
        load_in_8bit=True,
        load_in_16bit=True,
        dtype=torch.float16,
        rope_scaling={"rope_type": "liner", "factor": 2.0},
        use_cach=False,
    )
    assert "(5 problems)" in said
    for part in ("load_in_8bit, load_in_16bit", "bfloat16 or float32", "did you mean linear", "use_cache", "tokenizer"):
        assert part in said


def test_a_meaningless_value_does_not_hide_the_rest(llama: Path) -> None:
    said = refusal(OptionError, llama, max_seq_length="long", attn_implementation="fast", use_cach=True, dtype="x")
    assert "(4 problems)" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"use_cach": True}, "did you mean use_cache"),
        ({"nonsense": 1}, "leave it out"),
        ({"attn_implementation": "flash"}, "flash"),
        ({"expected_model_type": "cohere"}, "FastLanguageModel"),
        ({"resize_model_vocab": 10}, "resize_model_vocab=10"),
    ],
)
def test_arguments_that_the_config_decides(llama: Path, arguments: dict, said: str) -> None:
    assert said in refusal(OptionError, llama, **arguments)


def test_what_a_tied_or_fp16_unsafe_family_cannot(gemma: Path) -> None:
    assert "tied to the head" in refusal(OptionError, gemma, offload_embedding=True)
    assert "bfloat16 or float32" in refusal(OptionError, gemma, dtype=torch.float16)


@pytest.mark.parametrize("arguments", [{"load_in_8bit": True}, {"load_in_4bit": False}, {"full_finetuning": True}])
def test_a_checkpoint_stored_in_nf4_stays_so(llama: Path, copy_of: Copy, arguments: dict) -> None:
    folder = copy_of(llama)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "is already stored as nf4" in refusal(OptionError, folder, **arguments)


def test_quantising_without_bitsandbytes_names_the_extra(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a)
    )
    assert "hasten[train]" in refusal(MissingExtraError, llama)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_a_missing_folder(name: str) -> None:
    assert "there is nothing at" in refusal(CheckpointError, name)


def test_a_folder_without_config(tmp_path: Path) -> None:
    assert "no config.json" in refusal(CheckpointError, tmp_path)


@pytest.mark.parametrize("content", ["{not json", "{}", '{"model_type": "no_such_model"}'])
def test_a_config_that_cannot_be_read(llama: Path, copy_of: Copy, content: str) -> None:
    folder = copy_of(llama)
    (folder / "config.json").write_text(content)
    assert "config.json" in refusal(CheckpointError, folder)


def test_remote_code_is_not_run_unasked(llama: Path, copy_of: Copy, tmp_path: Path) -> None:
    folder = copy_of(llama)
    marker = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    assert "trust_remote_code" in refusal(CheckpointError, folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{broken", "not readable as JSON"),
        ("{}", "base_model_name_or_path"),
        ('{"base_model_name_or_path": "./gone"}', "nothing at"),
    ],
)
def test_an_adapter_that_does_not_lead_to_its_base(tmp_path: Path, record: str, said: str) -> None:
    (tmp_path / "adapter_config.json").write_text(record)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert said in refusal(CheckpointError, tmp_path)


def test_an_adapter_in_pickle(tmp_path: Path, llama: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(llama)}))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert "safetensors only" in refusal(CheckpointError, tmp_path)


def test_a_revision_means_nothing_in_a_local_folder(llama: Path) -> None:
    assert "revision" in refusal(OptionError, llama, revision="v1.0")


def test_a_tokenizer_of_another_model(llama: Path, copy_of: Copy) -> None:
    folder = copy_of(llama)
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    assert "belongs to another model" in refusal(TokenizerError, folder)


def test_added_tokens_need_rows_if_nothing_may_be_fixed(llama: Path, copy_of: Copy) -> None:
    folder = copy_of(llama)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<t{i}>" for i in range(40)])
    tokenizer.save_pretrained(folder)
    said = refusal(TokenizerError, folder, fix_tokenizer=False)
    assert f"resize_model_vocab={len(tiny_tokenizer()) + 40}" in said
