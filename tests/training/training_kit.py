"""Shared by the training tests: the same tiny model with and without overlays, examples of varying length, trainers."""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.kernels import chunked_logprob
from trl.trainer.utils import FusedCausalLMOutput

from hasten.methods import CausalLMMethods
from hasten.patching import apply, is_patched
from hasten.state import causal_lm_of
from hasten.testing import tiny_model, tiny_tokenizer
from hasten.testing.quantize import quantize_linears

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = ("llama", "gemma2", "cohere")
VOCABULARY = 288


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ALL_LINEAR, **changes})


def small(
    model_type: str,
    hasten: bool,
    adapter: LoraConfig | None = None,
    nf4: bool = False,
    attention: str = "eager",
    **changes: Any,
) -> Any:
    """A two-layer tiny model in training mode; the same weights for the same arguments, with and without overlays."""
    model = tiny_model(model_type, **{"num_hidden_layers": 2, "max_position_embeddings": 256, **changes})
    model.set_attn_implementation(attention)
    if nf4:
        quantize_linears(model)
    if hasten:
        apply(model, methods=CausalLMMethods)
    if adapter is not None:
        torch.manual_seed(1)
        model = get_peft_model(model, adapter)
        stir(model)
    assert is_patched(model) == hasten
    return model.train()


def stir(model: Any) -> None:
    """Sets LoRA B to non-zero values, so that no gradient is zero at step one."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def rows(count: int, longest: int = 24, seed: int = 0, masked: bool = True) -> Dataset:
    """Tokenised examples of varying length; with `masked` the first part of each, the prompt, has no labels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(6, longest + 1, (1,), generator=generator))
        ids = torch.randint(6, VOCABULARY - 26, (length,), generator=generator).tolist()
        prompt = int(torch.randint(1, length - 2, (1,), generator=generator)) if masked else 0
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(made)


RECOMPUTE = "activation_checkpointing"
if RECOMPUTE not in TrainingArguments.__dataclass_fields__:  # renamed in transformers 5.23; the old name warns there
    RECOMPUTE = "gradient_checkpointing"


@dataclass
class Recorder(TrainerCallback):
    """Copies of the gradients before each optimizer step."""

    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append(gradients_of(model))


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_settings(folder: Any, gradient_checkpointing: bool = False, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 2e-3,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        RECOMPUTE: gradient_checkpointing,
        "dataloader_pin_memory": False,
        **changes,
    }


def full_logits_forward(
    self: Any, *args: Any, temperature: float, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any
) -> Any:
    """TRL's protocol from stock's full logits."""
    stock = type(self).forward
    if not fused_lm_head:
        return stock(self, *args, labels=labels, **kwargs)
    logits = stock(self, *args, **{**kwargs, "use_cache": False}).logits[:, :-1].float() / temperature
    log_p = logits.log_softmax(-1)
    targets = labels[:, 1:]
    mask = targets != -100
    log_probs = log_p.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1) * mask
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / mask.sum().clamp(min=1),
        log_probs=log_probs,
        entropy=-(log_p.exp() * log_p).sum(-1) * mask,
        log_sum_sq_probs=(2 * log_p).logsumexp(-1).detach() * mask,
        mean_logits=logits.mean(-1).detach() * mask,
        is_top1=(log_p.argmax(-1) == targets) & mask,
        label_mask=mask,
    )


def on_cpu(trainer: Any) -> Any:
    """TRL 1.15 scores stock models with a Triton kernel even on the CPU, where none runs; full logits take its place."""
    base = causal_lm_of(trainer.model)
    if not is_patched(base) and not hasattr(chunked_logprob, "_use_triton"):
        temperature = getattr(trainer.args, "temperature", 1.0)
        base.forward = types.MethodType(functools.partial(full_logits_forward, temperature=temperature), base)
    return trainer


def sft(model: Any, data: Any, folder: Any, trainer: dict[str, Any] | None = None, **changes: Any) -> SFTTrainer:
    """TRL's trainer, unmodified, ready to train."""
    settings = {"max_length": 64, **plain_settings(folder, **changes)}
    extra = {"processing_class": tiny_tokenizer(), **(trainer or {})}
    return on_cpu(SFTTrainer(model=model, args=SFTConfig(**settings), train_dataset=data, **extra))


def hf(model: Any, data: Any, folder: Any, trainer: dict[str, Any] | None = None, **changes: Any) -> Trainer:
    """transformers' trainer, unmodified, ready to train on tokenised examples."""
    collator = DataCollatorForSeq2Seq(tiny_tokenizer(), padding=True)
    arguments = TrainingArguments(**plain_settings(folder, **changes))
    return Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator, **(trainer or {}))


def curve(trainer: Any, key: str = "loss") -> torch.Tensor:
    """Trains and returns the logged value of each step."""
    trainer.train()
    return logged(trainer, key)


def logged(trainer: Any, key: str) -> torch.Tensor:
    return torch.tensor([entry[key] for entry in trainer.state.log_history if key in entry], dtype=torch.float64)


def both(make: Callable[[bool], Any]) -> tuple[Any, Any]:
    """(stock, ours), each made and used from the same seed."""
    made = []
    for hasten in (False, True):
        torch.manual_seed(0)
        made.append(make(hasten))
    return made[0], made[1]


def apart(ours: torch.Tensor, stock: torch.Tensor) -> float:
    """Largest relative distance of two curves of the same length."""
    assert ours.shape == stock.shape and ours.numel() > 0
    assert bool(torch.isfinite(ours).all()) and bool(torch.isfinite(stock).all())
    return float(((ours - stock).abs() / stock.abs().clamp(min=1e-6)).max())


def gradients_apart(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> float:
    """Largest relative distance of two sets of gradients: per tensor, relative to its norm or to 1e-4 of the largest norm."""
    assert ours.keys() == stock.keys() and ours
    floor = 1e-4 * max(float(g.norm()) for g in stock.values())
    return max(float((ours[n] - stock[n]).norm()) / max(float(stock[n].norm()), floor) for n in stock)


def preferences(count: int, seed: int = 0) -> Dataset:
    """Prompts with a chosen and a rejected completion, of varying length, as text."""
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_list(
        [{name: _letters(generator, 2, 14) for name in ("prompt", "chosen", "rejected")} for _ in range(count)]
    )


def dpo(model: Any, data: Any, folder: Any, trainer: dict[str, Any] | None = None, **changes: Any) -> DPOTrainer:
    """TRL's DPO trainer, unmodified, ready to train."""
    extra = {"processing_class": tiny_tokenizer(), **(trainer or {})}
    settings = {"max_length": 64, **plain_settings(folder, **changes)}
    return on_cpu(DPOTrainer(model=model, args=DPOConfig(**settings), train_dataset=data, **extra))


def _letters(generator: torch.Generator, shortest: int, longest: int) -> str:
    length = int(torch.randint(shortest, longest, (1,), generator=generator))
    return "".join(chr(97 + int(torch.randint(0, 26, (1,), generator=generator))) for _ in range(length))


def texts(count: int, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_list([{"text": _letters(generator, 12, 28)} for _ in range(count)])


def chats(count: int, seed: int = 0) -> Dataset:
    """Conversations of two turns each side."""
    generator = torch.Generator().manual_seed(seed)
    roles = ("user", "assistant", "user", "assistant")
    return Dataset.from_list(
        [{"messages": [{"role": r, "content": _letters(generator, 2, 8)} for r in roles]} for _ in range(count)]
    )


def grpo(model: Any, data: Any, folder: Any, reward: Callable[..., list[float]], **changes: Any) -> GRPOTrainer:
    """TRL's GRPO trainer, unmodified, ready to train."""
    settings = {"num_generations": 4, "max_completion_length": 8, **plain_settings(folder, **changes)}
    extra = {"processing_class": tiny_tokenizer(), "reward_funcs": reward}
    return on_cpu(GRPOTrainer(model=model, args=GRPOConfig(**settings), train_dataset=data, **extra))
