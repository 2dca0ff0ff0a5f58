"""The measured shapes as transformers configs, and random-weight checkpoints of them on disk.

    python -m benchmarks.shapes SHAPE FOLDER
writes one, in a process of its own so that nothing of it stays on the GPU.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.jobs import SHAPES


def config_of(name: str) -> Any:
    from transformers import AutoConfig

    shape = dict(SHAPES[name])
    return AutoConfig.for_model(shape.pop("model_type"), **shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def checkpoint(name: str, folder: Path) -> Path:
    """Writes a bf16 checkpoint with random weights once, drawn on the GPU where there is one, and returns its folder."""
    target = folder / name
    if (target / "config.json").exists():
        return target
    import torch
    from transformers import AutoModelForCausalLM

    from hasten.testing import tiny_tokenizer

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
    part = folder / f"{name}.part"
    model.save_pretrained(part, max_shard_size="4GB")
    tiny_tokenizer().save_pretrained(part)
    part.rename(target)
    return target


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(arguments)
    checkpoint(args.shape, args.folder)


if __name__ == "__main__":
    main(sys.argv[1:])
