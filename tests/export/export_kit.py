"""Trained-looking adapters on tiny checkpoints, and what a process that never heard of hasten makes of the artefacts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hasten.patching import apply
from hasten.testing import save_tiny

IDS = torch.randint(6, 260, (2, 20), generator=torch.Generator().manual_seed(1))
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

FRESH = """
import json, socket, sys
def refuse(*args, **kwargs): raise OSError("no network")
socket.socket.connect = refuse
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
job = json.loads(sys.argv[1])
found = {}
for number, (folder, adapter) in enumerate(job["folders"]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if adapter:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        found[str(number)] = model.eval()(torch.tensor(job["ids"])).logits.float().contiguous()
assert not [name for name in sys.modules if name.split(".")[0] == "hasten"]
save_file(found, job["out"])
"""


def base_folder(folder: Path, model_type: str = "llama", **kwargs: Any) -> Path:
    """A checkpoint in several shards. Width 128 of the MLP, so that bitsandbytes' CPU kernel can take it."""
    return save_tiny(folder, model_type, **{"max_shard_size": "60KB", "intermediate_size": 128, **kwargs})


def load(folder: Path, quantization_config: Any = None, dtype: Any = "auto") -> Any:
    """The base model as the loader leaves it, with overlays on."""
    asked = {} if quantization_config is None else {"quantization_config": quantization_config}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **asked)
    apply(model)
    return model


def adapt(model: Any, **config: Any) -> Any:
    """An adapter on `model` whose every tensor is away from its initial value, as after training."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(model, LoraConfig(**config)).eval()
    train(model)
    return model


def train(model: Any, seed: int = 0) -> None:
    """Moves every trainable tensor by noise of a tenth of its size (zeros: of a fixed size)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                size = 0.1 * parameter.float().std().nan_to_num() + 0.02
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device) * size
                parameter.add_(noise.to(parameter.dtype))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(ids).logits.float()


def fresh_logits(
    folders: list[Any], scratch: Path, ids: torch.Tensor = IDS, cwd: Path | None = None
) -> list[torch.Tensor]:
    """Logits of each (folder, adapter or None) in a new process with plain transformers and PEFT, offline, in fp32."""
    out = scratch / "fresh.safetensors"
    pairs = [(str(f[0]), str(f[1]) if f[1] else None) if isinstance(f, tuple) else (str(f), None) for f in folders]
    job = json.dumps({"folders": pairs, "ids": ids.tolist(), "out": str(out)})
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, job], env=env, cwd=cwd or scratch, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(out)
    return [found[str(number)] for number in range(len(folders))]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint. Fails if one is in two shards or the index is not exactly what the shards hold."""
    found: dict[str, torch.Tensor] = {}
    homes: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert name not in found, f"{name} twice"
                found[name] = file.get_tensor(name)
                homes[name] = path.name
    index = folder / "model.safetensors.index.json"
    if len(set(homes.values())) > 1:
        listed = json.loads(index.read_text())
        assert listed["weight_map"] == homes
        assert listed["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    else:
        assert not index.exists()
    return found


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Relative error of the whole, against the expected tensor's largest value."""
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"
