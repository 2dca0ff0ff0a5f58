"""The measured shapes as transformers configs, and random-weight checkpoints of them on disk."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.harness.jobs import SHAPES


def config_of(name: str) -> Any:
    from transformers import AutoConfig

    shape = dict(SHAPES[name])
    return AutoConfig.for_model(shape.pop("model_type"), **shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def checkpoint(name: str, folder: Path) -> Path:
    """Writes a bf16 checkpoint with random weights, drawn on the GPU if there is one, unless it exists. Returns its folder."""
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


def write_apart(name: str, folder: Path) -> Path:
    """`checkpoint` in a process of its own, so that nothing of it stays on the GPU."""
    if (folder / name / "config.json").exists():
        return folder / name
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(checkpoint, name, folder).result()


def with_positions(folder: Path, positions: int) -> Path:
    """Returns the checkpoint, or if its config allows fewer positions, a copy that allows them and links to its weights."""
    config = json.loads((folder / "config.json").read_text())
    if config["max_position_embeddings"] >= positions:
        return folder
    target = folder.with_name(f"{folder.name}-{positions}")
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        link = target / file.name
        if file.name != "config.json" and not link.exists():
            link.symlink_to(file.resolve())
    (target / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}, indent=2))
    return target
