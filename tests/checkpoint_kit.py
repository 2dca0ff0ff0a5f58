"""Checkpoints that show whether their weights were read."""

from pathlib import Path

from safetensors.torch import load_file, save_file


def poison(folder: Path) -> Path:
    """Puts NaN into every stored matrix, so that a call which reads weights raises another error than one which does not."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for tensor in tensors.values():
            if tensor.dim() == 2:
                tensor[0, 0] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})
    return folder
