"""Loads a checkpoint and adds a LoRA in each library's own way. The models return a loss for `labels`."""

import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.jobs import BEFORE, GIB, Job, is_hasten
from benchmarks.harness.timing import DEVICE

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKPOINTING = {"keep": False, "recompute": True, "offload": "offload", "default": "unsloth", "budget": "auto"}
"""hasten's use_gradient_checkpointing in each mode."""

MODULES = {
    "unsloth": "unsloth", "hasten": "hasten", BEFORE: "hasten", "liger": "liger_kernel.transformers",
    "trl": "trl.trainer.utils",
}  # fmt: skip
"""What a variant must import before transformers."""


def import_library(variant: str, tree: Path | None = None) -> float:
    """Imports the library of `variant` before anything else imports transformers. Returns seconds.

    tree: a folder whose package `hasten` is imported in place of the installed one; the running `benchmarks` stays. Raises
    ImportError if the folder has no hasten or another one has been imported before.
    """
    begin = time.perf_counter()
    if tree is not None:
        sys.path.insert(0, str(tree.resolve()))
    for name in (MODULES.get(variant), "peft"):
        if name is not None:
            import_module(name)
    if tree is not None:
        found = Path(str(sys.modules["hasten"].__file__)).resolve()
        if not found.is_relative_to(tree.resolve()):
            raise ImportError(f"hasten was to be imported from {tree.resolve()}, but comes from {found.parent}")
    return time.perf_counter() - begin


def build(variant: str, job: Job, mode: str, folder: Path) -> tuple[Any, Callable[..., Any]]:
    """Returns (the model in training mode, a function (input ids) -> loss). folder: the checkpoint."""
    make = _build_fast if is_hasten(variant) or variant == "unsloth" else _build_transformers
    model = make(variant, job, mode, folder)
    same_start(model)
    extra = {"fused_lm_head": True} if variant == "trl" else {}

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids, **extra).loss

    return model, loss


def _build_fast(variant: str, job: Job, mode: str, folder: Path) -> Any:
    if variant == "unsloth":
        from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

        policy: dict[str, Any] = {"use_gradient_checkpointing": "unsloth" if mode != "keep" else False}
    else:
        from hasten import FastLanguageModel

        policy = {"use_gradient_checkpointing": CHECKPOINTING[mode]}
        if mode == "budget":
            policy["memory_budget"] = f"{job.budget_gib}GiB"
    extra = dict(policy) if job.kind == "full" else {}
    if job.offload_embedding:
        extra["offload_embedding"] = True
    if is_hasten(variant):
        extra["fix_tokenizer"] = False
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=job.length, dtype=torch.bfloat16, load_in_4bit=job.kind == "qlora",
        load_in_16bit=job.kind == "lora", full_finetuning=job.kind == "full", **extra,
    )  # fmt: skip
    if job.kind == "full":
        return model.train()
    adapted: Any = FastLanguageModel.get_peft_model(
        model, r=job.rank, target_modules=LINEARS, lora_alpha=job.rank, **policy
    )
    return adapted.train()


def _build_transformers(variant: str, job: Job, mode: str, folder: Path) -> Any:
    if variant == "liger":
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            AutoLigerKernelForCausalLM as Auto,
        )
    else:
        from transformers import AutoModelForCausalLM as Auto
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    quantization: dict[str, Any] = {}
    if job.kind == "qlora":
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    model: Any = Auto.from_pretrained(folder, dtype=torch.bfloat16, device_map=DEVICE, **quantization)
    if variant == "trl":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)
    if job.kind != "full":
        config = LoraConfig(r=job.rank, lora_alpha=job.rank, target_modules=LINEARS, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    if mode != "keep":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def same_start(model: Any, seed: int = 1, scale: float = 0.01) -> None:
    """Draws the same LoRA A for every variant: normal, times `scale`. B is zero everywhere."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data = drawn.to(parameter.device, parameter.dtype)


def planned(model: Any, batch: int, length: int) -> dict[str, Any]:
    """{"plan", "predicted_gib"} of hasten's latest plan; without a memory policy, the formulas' answer for saving everything.

    {} if the policy has not planned yet.
    """
    from hasten.training.memory.actions import ActivationAction
    from hasten.training.memory.costs import ModelShape
    from hasten.training.memory.plan import uniform_plan
    from hasten.training.memory.policy import policy_of

    policy = policy_of(model)
    if policy is None or not policy.mode:
        plan = uniform_plan(ModelShape.of_model(model, torch.bfloat16), batch, length, ActivationAction.SAVE_ALL)
    else:
        plan = policy.latest
    if plan is None:
        return {}
    return {"plan": str(plan), "predicted_gib": plan.peak.total / GIB}
