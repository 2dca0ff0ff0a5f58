"""Where a model goes is checked first; NaN and infinity are never written, whatever the form."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from export_kit import adapt, base_folder, load
from safetensors.torch import load_file, save_file

from hasten.errors import ExportError
from hasten.export import push_to_hub_merged, save_merged
from hasten.export.fill import replace_inside
from hasten.export.target import absolute, check_writable


@pytest.mark.parametrize("folder", ["", "  ", None, 3, "a\0b"])
def test_a_folder_is_a_path(folder: Any) -> None:
    with pytest.raises(ExportError, match="pass a path"):
        absolute(folder)


def test_targets_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="is a file"):
        check_writable(tmp_path / "file")
    with pytest.raises(ExportError, match=r"is a file"):
        check_writable(tmp_path / "file/below/it")
    with pytest.raises(ExportError, match="GiB free"):
        check_writable(tmp_path / "new/folder", needed=2**60)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ExportError, match="no permission"):
        check_writable(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["file"]


@pytest.mark.parametrize("name", ["", "a/b/c", "https://x", "-x", "a b"])
def test_a_repository_is_checked_before_a_merge(name: str) -> None:
    with pytest.raises(ExportError, match="cannot be the name of a hub repository"):
        push_to_hub_merged(torch.nn.Linear(1, 1), name)


@pytest.mark.parametrize("method", ["merged_16bit", "merged_4bit", "lora"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_written(tmp_path: Path, method: str, value: float) -> None:
    model = adapt(load(base_folder(tmp_path / "base")))
    layer = model.base_model.model.model.layers[0]
    if method == "lora":
        layer.self_attn.q_proj.lora_B["default"].weight.data[0, 0] = value
    else:
        layer.mlp.up_proj.base_layer.weight.data[0, 0] = value
    with pytest.raises(ExportError, match="(NaN or inf|not finite)"):
        save_merged(model, tmp_path / "out", save_method=method)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("method", ["merged_16bit", "merged_4bit"])
def test_a_base_with_nan_is_not_merged(tmp_path: Path, method: str) -> None:
    """The adapter changes this tensor, or does not: neither is written."""
    base = base_folder(tmp_path / "base")
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight"):
        path = next(path for path in base.glob("*.safetensors") if name in load_file(path))
        before = path.read_bytes()
        tensors = load_file(path)
        tensors[name].view(-1)[3] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ExportError, match=name):
            save_merged(adapt(load(base)), tmp_path / "out", save_method=method)
        assert not (tmp_path / "out").exists()
        path.write_bytes(before)


def test_a_failed_move_brings_the_old_content_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, target, old = tmp_path / "work", tmp_path / "target", tmp_path / "old"
    for folder, text in ((work, "new"), (target, "before")):
        folder.mkdir()
        for name in ("config.json", "hasten.json", "weights"):
            (folder / name).write_text(text)
    rename, moves = Path.rename, iter(range(100))

    def failing(self: Path, to: Path) -> Path:
        if self.parent == work and next(moves) == 1:
            raise OSError("full")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="full"):
        replace_inside(work, target, old)
    assert {path.name: path.read_text() for path in target.iterdir()} == dict.fromkeys(
        ("config.json", "hasten.json", "weights"), "before"
    )
    assert not old.exists() and len(list(work.iterdir())) == 3
    replace_inside(work, target, old)
    assert {path.read_text() for path in target.iterdir()} == {"new"}
