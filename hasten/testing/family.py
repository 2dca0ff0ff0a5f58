"""Compares a family's overlays numerically with the installed transformers classes (`check_family`).

On one amplified tiny model and its patched copy: logits, loss, every gradient, LoRA gradients, prefill and decode,
left-padded batches against single sequences, and in bf16 the norms and attentions, whose casts the data file records.
"""

import copy
from typing import Any

import torch
from torch import nn

from hasten.families.schema import Family
from hasten.overlays.cache_name import CACHE
from hasten.patching import apply, plan
from hasten.patching.contract import role_of
from hasten.testing.accuracy import Comparison
from hasten.testing.tiny import VOCABULARY, tiny_model

LOGITS, GRADIENTS, CASTS = 2e-5, 2e-4, 2e-4
TOKENS = 40
LENGTH_DEPENDENT = ("dynamic", "longrope")


def check_family(family: Family, model: Any = None, quantized: bool = False) -> Comparison:
    """Compares `family`'s overlays with stock transformers and returns the comparison.

    model: a stock fp32 causal LM to compare on (None = `tiny_model(family.model_type)`); it is not changed.
    quantized: also compare the gradients of a LoRA over NF4 weights (needs bitsandbytes).
    Raises ContractError where the classes' structure differs from the data file, AccuracyError where numbers do.
    """
    stock = tiny_model(family.model_type) if model is None else model
    ours = copy.deepcopy(stock)
    apply(ours, plan(ours, family))
    seen = Comparison(f"{family.model_type}: hasten against transformers, fp32")
    with torch.no_grad():
        _compare_forward(ours, stock, seen)
        _compare_decoding(ours, stock, seen)
        _compare_padding(ours, stock, seen)
        _compare_casts(ours, stock, family, seen)
    seen.check()
    _compare_training("", ours, stock, seen)
    _compare_training("LoRA ", _with_lora(ours), _with_lora(stock), seen)
    if quantized:
        compare_quantized(family, stock, seen)
    return seen.check()


def compare_quantized(family: Family, stock: Any, seen: Comparison) -> None:
    """Compares the gradients of a LoRA over the same NF4 weights, with and without overlays."""
    from hasten.testing.quantize import quantize_linears

    plain = quantize_linears(copy.deepcopy(stock))
    patched = copy.deepcopy(plain)
    apply(patched, plan(patched, family))
    _compare_training("QLoRA ", _with_lora(patched), _with_lora(plain), seen)


def _ids(batch: int = 2, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(6, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


def _compare_forward(ours: Any, stock: Any, seen: Comparison) -> None:
    ids = _ids()
    seen.add("logits", ours(ids).logits, stock(ids).logits, LOGITS)


def _compare_decoding(ours: Any, stock: Any, seen: Comparison) -> None:
    """Compares a prefill of all but five tokens, then decoding one token at a time, with the full forward."""
    ids = _ids()
    full = stock(ids).logits
    past, steps = None, []
    for part in (ids[:, : TOKENS - 5], *ids[:, TOKENS - 5 :].split(1, dim=1)):
        outputs = ours(part, use_cache=True, **{CACHE: past})
        past = outputs[CACHE]
        steps.append(outputs.logits)
    seen.add("prefill and decode", torch.cat(steps, dim=1), full, LOGITS)


def _compare_padding(ours: Any, stock: Any, seen: Comparison) -> None:
    """Compares sequences of three lengths, left-padded into one batch, with each sequence alone.

    RoPE types that depend on the longest sequence of a batch make sequences depend on each other in transformers too;
    there the reference is the same batch.
    """
    ids, lengths = _ids(3), (TOKENS, 23, 5)
    mask = torch.stack([(torch.arange(TOKENS) >= TOKENS - length).long() for length in lengths])
    batch = {"input_ids": ids * mask, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    batched = ours(**batch).logits
    rope = getattr(stock.config, "rope_parameters", None) or {}
    together = stock(**batch).logits if rope.get("rope_type") in LENGTH_DEPENDENT else None
    for index, length in enumerate(lengths):
        start = TOKENS - length
        reference = stock(ids[index : index + 1, start:]).logits[0] if together is None else together[index, start:]
        seen.add(f"left-padded sequence of {length}", batched[index, start:], reference, LOGITS)


def _compare_casts(ours: Any, stock: Any, family: Family, seen: Comparison) -> None:
    """Compares norms and attentions one by one in bf16, which shows the order of casts; on the CPU they are
    bit-exact."""
    ours, stock = copy.deepcopy(ours).bfloat16(), copy.deepcopy(stock).bfloat16()
    generator = torch.Generator().manual_seed(2)
    width = stock.config.hidden_size
    x = (torch.randn(2, TOKENS, width, generator=generator) * 2).bfloat16()
    position = (torch.arange(TOKENS) + 50)[None]
    for name, module in stock.named_modules():
        role = role_of(module, family.classes)
        if role == "norm" and module.weight.shape == (width,):
            seen.add(f"bf16 {name}", ours.get_submodule(name)(x), module(x), CASTS)
        if role == "attention":
            layer_type = (getattr(module, "layer_type", None),) if family.model_type == "gemma3_text" else ()
            tables = stock.model.rotary_emb(x, position, *layer_type)
            mask = _causal(TOKENS, x.dtype)
            mine = ours.get_submodule(name)(x, position_embeddings=tables, attention_mask=mask)[0]
            seen.add(f"bf16 {name}", mine, module(x, position_embeddings=tables, attention_mask=mask)[0], CASTS)


def _causal(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return torch.zeros(1, 1, tokens, tokens, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)


def _with_lora(model: Any) -> Any:
    """Returns a PEFT LoRA on every Linear, the same at every call; B is not zero, so that A gets a gradient."""
    from peft import LoraConfig, get_peft_model

    state = torch.random.get_rng_state()
    torch.manual_seed(3)
    lora = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    torch.random.set_rng_state(state)
    return lora


def _compare_training(prefix: str, ours: Any, stock: Any, seen: Comparison) -> None:
    """Compares the loss (half of the labels masked) and the gradient of every trained weight."""
    ids = _ids()
    labels = ids.clone()
    labels[:, : TOKENS // 2] = -100
    losses = []
    for model in (ours, stock):
        model.train()
        model.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        losses.append(loss)
    seen.add(f"{prefix}loss", losses[0], losses[1], LOGITS)
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        reference = theirs[name].grad
        if reference is None and parameter.grad is None:
            continue
        missing = torch.full_like(parameter, float("nan"))
        grad = missing if parameter.grad is None else parameter.grad
        seen.add(f"{prefix}gradient of {name}", grad, missing if reference is None else reference, GRADIENTS)
