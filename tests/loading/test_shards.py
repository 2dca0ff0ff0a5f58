"""The pre-flight over shard headers finds each way in which a checkpoint can be broken, all of them at once."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from device_kit import DEVICE
from safetensors.torch import load_file, save_file

from hasten.errors import CheckpointError
from hasten.loading import load
from hasten.loading.shards import read_checkpoint, read_header
from hasten.options import LoadOptions
from hasten.testing import save_tiny, tiny_model

Copy = Callable[[Path], Path]


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(LoadOptions(model_name=str(folder), max_seq_length=64))
    return str(caught.value)


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_headers_describe_what_safetensors_reads(llama: Path) -> None:
    found = read_checkpoint(llama)
    assert found.keys() == tiny_model("llama").state_dict().keys()
    for path in shards_of(llama):
        for name, tensor in load_file(path).items():
            assert found[name].shape == tuple(tensor.shape)
            assert found[name].file == path.name


def test_missing_truncated_and_garbled_shards_are_named_together(llama: Path, copy_of: Copy) -> None:
    folder = copy_of(llama)
    missing, short, garbled, swollen = shards_of(folder)[:4]
    missing.unlink()
    short.write_bytes(short.read_bytes()[:-100])
    garbled.write_bytes(struct.pack("<Q", 10) + b"not json!!" + b"0" * 50)
    swollen.write_bytes(swollen.read_bytes() + b"more")
    said = refusal(folder)
    assert f"{missing.name} is missing" in said
    assert f"{short.name} has" in said
    assert f"{garbled.name} has an unreadable header" in said
    assert f"{swollen.name} has" in said
    assert "(4 problems)" in said


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 2**40) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="x.safetensors"):
        read_header(tmp_path / "x.safetensors")


def test_wrong_shapes_and_missing_tensors_are_all_named(llama: Path, copy_of: Copy) -> None:
    folder = copy_of(llama)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 80
    config["num_hidden_layers"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    said = refusal(folder)
    assert "model.layers.0.mlp.up_proj.weight is (128, 64)" in said
    assert "the model's is (80, 64)" in said
    assert "and 1 more" in said  # 4 x 3 wrong shapes and the 9 tensors of the fifth layer, 20 of which are listed


def test_an_index_that_lies(llama: Path, copy_of: Copy) -> None:
    folder = copy_of(llama)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = shards_of(folder)[0].name
    path.write_text(json.dumps(index))
    assert "model.norm.weight should be in" in refusal(folder)
    index["weight_map"]["model.norm.weight"] = "../../secret.safetensors"
    path.write_text(json.dumps(index))
    assert "outside of its folder" in refusal(folder)
    path.write_text("{half")
    assert "is not readable" in refusal(folder)


def test_pickle_is_refused_unless_asked_for(llama: Path, copy_of: Copy) -> None:
    folder = copy_of(llama)
    for path in [*shards_of(folder), folder / "model.safetensors.index.json"]:
        path.unlink()
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")
    assert "use_safetensors=False" in refusal(folder)
    options = LoadOptions(
        model_name=str(folder), max_seq_length=64, load_in_4bit=False, dtype=torch.float32, use_safetensors=False
    )
    expected = tiny_model("llama").to(DEVICE).state_dict()  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(value, expected[name]) for name, value in load(options).model.state_dict().items())


def test_a_pickle_with_code_does_not_run_it(llama: Path, copy_of: Copy, tmp_path: Path) -> None:
    folder = copy_of(llama)
    for path in [*shards_of(folder), folder / "model.safetensors.index.json"]:
        path.unlink()
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple:
            return open, (str(marker), "w")

    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    options = LoadOptions(model_name=str(folder), max_seq_length=64, use_safetensors=False)
    with pytest.raises(Exception, match="(?i)weights.only"):
        load(options)
    assert not marker.exists()


def test_no_weights_at_all(llama: Path, copy_of: Copy) -> None:
    folder = copy_of(llama)
    for path in [*shards_of(folder), folder / "model.safetensors.index.json"]:
        path.unlink()
    assert "has neither model.safetensors nor" in refusal(folder)


def test_tied_heads_need_one_of_the_two_and_surplus_tensors_do_no_harm(gemma: Path, copy_of: Copy) -> None:
    folder = copy_of(gemma)
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["rotary.inv_freq"] = torch.zeros(4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(LoadOptions(model_name=str(folder), max_seq_length=64, dtype=torch.float32)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight.cpu(), weights["model.embed_tokens.weight"])


def test_a_variant_and_a_backbones_own_checkpoint(tmp_path: Path) -> None:
    save_tiny(tmp_path, "gemma")
    (tmp_path / "model.safetensors").rename(tmp_path / "model.half.safetensors")
    load(LoadOptions(model_name=str(tmp_path), max_seq_length=64, extra={"variant": "half"}))
    bare = {k.removeprefix("model."): v for k, v in load_file(tmp_path / "model.half.safetensors").items()}
    save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(LoadOptions(model_name=str(tmp_path), max_seq_length=64, dtype=torch.float32)).model
    assert torch.equal(model.model.norm.weight.cpu(), bare["norm.weight"])
