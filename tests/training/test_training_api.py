"""The same through FastLanguageModel, from a checkpoint on disk: against transformers, PEFT and TRL alone; and in a sandbox."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from training_kit import ALL_LINEAR, apart, chats, curve, lora, sft, stir
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTTrainer

from hasten.model import FastLanguageModel
from hasten.testing import save_tiny
from hasten.training import sft_config

STEPS = 12
# Sizes that are multiples of 64, so that bitsandbytes' NF4 on the CPU can take every matrix.
SIZES = {
    "llama": {"intermediate_size": 128},
    "gemma2": {"intermediate_size": 128, "head_dim": 32},
    "cohere": {"intermediate_size": 128},
}
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 256}
    return {family: save_tiny(root / family, family, **sizes, **changes) for family, changes in SIZES.items()}


def ours(folder: Path, way: str) -> tuple[Any, Any]:
    options = {"max_seq_length": 64, "dtype": torch.float32, "attn_implementation": "eager"}
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), load_in_4bit=way == "QLoRA", full_finetuning=way == "full", **options
    )
    if way != "full":
        model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=8, target_modules=ALL_LINEAR)
        stir(model)
    return model, tokenizer


def stocks(folder: Path, way: str) -> Any:
    quantised = {"quantization_config": NF4, "device_map": "cpu"} if way == "QLoRA" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **quantised)
    return model.train() if way == "full" else get_peft_model(model, lora())


@pytest.mark.grid(1)
@pytest.mark.parametrize("way", ["LoRA", "QLoRA", "full"])
@pytest.mark.parametrize("family", SIZES)
def test_loss_curve_of_the_public_api_is_stocks(
    family: str, way: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model, tokenizer = ours(checkpoints[family], way)
    reference = stocks(checkpoints[family], way)
    if way != "full":
        weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
        missing = reference.load_state_dict(weights, strict=False)
        assert weights and not missing.unexpected_keys
    settings = {"max_steps": STEPS, "learning_rate": 2e-4 if way == "full" else 2e-3}
    stock = sft(reference, chats(16), tmp_path, {"processing_class": tokenizer}, **settings)
    for parameter in reference.parameters():
        if parameter.requires_grad:  # TRL has rounded QLoRA's to bf16, as it will ours, which come back to fp32
            parameter.data = parameter.data.float()
    mine = sft(model, chats(16), tmp_path, {"processing_class": tokenizer}, **settings)
    torch.manual_seed(0)
    expected = curve(stock)
    torch.manual_seed(0)
    found = curve(mine)
    assert len(found) == STEPS and apart(found, expected) < 1e-5
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_one_whole_job_without_a_socket_in_a_read_only_folder(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    here, out, cwd = Path(__file__).parent, tmp_path / "out", tmp_path / "cwd"
    out.mkdir()
    cwd.mkdir()
    cwd.chmod(0o555)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(out),
        "TMPDIR": str(out),
        "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL's own; offline mode stays off, so that an attempt of ours would show
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(here.parent.parent), str(here)]),
    }
    command = [sys.executable, str(here / "sandboxed_job.py"), str(checkpoints["llama"]), str(out)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    record = json.loads((out / "record.json").read_text())
    assert record["violations"] == [] and record["left"] == []
    assert len(record["losses"]) == 4 and record["rows"] == 8 and record["new"] == 4
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    assert (out / "run" / "checkpoint-4" / "optimizer.pt").exists()


def test_the_watch_of_the_shut_in_job_does_see(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.argv = ['job', 'base', {str(tmp_path / 'out')!r}]; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import sandboxed_job as job, socket\n"
        "sys.addaudithook(job.watch)\n"
        "for act in (lambda: open('written', 'w'), lambda: socket.create_connection(('127.0.0.1', 9), 1)):\n"
        "    try: act()\n"
        "    except PermissionError: pass\n"
        "assert len(job.violations) == 2, job.violations\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=60)


def test_the_trainers_length_is_the_models(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model, tokenizer = ours(checkpoints["llama"], "LoRA")
    arguments = sft_config(model, output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = SFTTrainer(model, args=arguments, train_dataset=chats(4), processing_class=tokenizer)
    assert trainer.args.max_length == 64 and not trainer.args.bf16
