"""The head in training: every adapter variant, TRL's fused protocol, autocast, label smoothing; and no full logits."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from training_kit import (
    ALL_LINEAR,
    FAMILIES,
    VOCABULARY,
    Recorder,
    apart,
    gradients_apart,
    gradients_of,
    hf,
    logged,
    lora,
    rows,
    sft,
    small,
)
from trl.trainer.utils import add_fused_lm_head

from hasten.ops.linear_cross_entropy import ScoreConfig
from hasten.state import causal_lm_of

ALLOWED = 1e-5
UNTIED = {"tie_word_embeddings": False}
HEAD_DROPOUT = lora(target_modules=["lm_head"], lora_dropout=0.3)

ADAPTERS: dict[str, tuple[LoraConfig | None, dict[str, Any]]] = {
    "LoRA on the head": (lora(target_modules=[*ALL_LINEAR, "lm_head"]), UNTIED),
    "DoRA on the head": (lora(target_modules=["q_proj", "lm_head"], use_dora=True), UNTIED),
    "trained head": (lora(modules_to_save=["lm_head"]), UNTIED),
    "trained embedding and head": (lora(modules_to_save=["embed_tokens", "lm_head"]), UNTIED),
    "tied": (lora(), {"tie_word_embeddings": True}),
    "tied, trained": (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), {"tie_word_embeddings": True}),
    "tied, full": (None, {"tie_word_embeddings": True}),
    "dropout": (lora(lora_dropout=0.3), {}),
    "DoRA": (lora(use_dora=True), {}),
    "rsLoRA": (lora(use_rslora=True), {}),
    "bias all": (lora(bias="all"), {"attention_bias": True}),
    "bias lora_only": (lora(bias="lora_only"), {"attention_bias": True}),
    "LoRA on B's bias too": (lora(target_modules=["q_proj", "lm_head"], lora_bias=True), UNTIED),
}


def ragged(count: int = 4, longest: int = 20) -> dict[str, torch.Tensor]:
    """A right-padded batch with masked prompts."""
    data = rows(count, longest=longest, seed=5)
    width = max(len(row["input_ids"]) for row in data)
    pads = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    filled = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in data]
    return {
        key: torch.tensor([row[key] + [pad] * (width - len(row[key])) for row in filled]) for key, pad in pads.items()
    }


def step(model: Any, autocast: bool = False, **extra: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(11)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        loss = model(**ragged(), **extra).loss
    loss.backward()
    return loss.detach()[None], gradients_of(model)


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_adapter_are_stocks(family: str, case: str) -> None:
    adapter, changes = ADAPTERS[case]
    if family == "gemma2" and "attention_bias" in changes:
        changes = {}
    stock_loss, stock = step(small(family, False, adapter, **changes))
    loss, ours = step(small(family, True, adapter, **changes))
    assert apart(loss, stock_loss) < ALLOWED and gradients_apart(ours, stock) < ALLOWED
    if "on the head" in case:
        assert all(float(g.norm()) > 0 for n, g in ours.items() if "lm_head" in n)
        assert any("lm_head" in name for name in ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_on_the_head_is_the_same_in_forward_and_backward(family: str) -> None:
    """Stock drops entries of rows that have no label too, so its mask cannot be had; PEFT's own module on our rows can."""
    batch = ragged()
    model = small(family, True, HEAD_DROPOUT, **UNTIED)
    torch.manual_seed(11)
    loss = model(**batch).loss
    loss.backward()
    ours = gradients_of(model)

    model.zero_grad()
    base = causal_lm_of(model)
    torch.manual_seed(11)
    hidden = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    logits = base._logits(hidden[:, :-1].flatten(0, 1))
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
    expected.backward()
    assert apart(loss.detach()[None], expected.detach()[None]) < ALLOWED
    assert gradients_apart(ours, gradients_of(model)) < ALLOWED
    torch.manual_seed(12)
    assert apart(model(**batch).loss.detach()[None], expected.detach()[None]) > ALLOWED, "no dropout at all"


@pytest.mark.parametrize("case", ["LoRA on the head", "trained head", "dropout", "DoRA on the head", "tied, full"])
def test_autocast_stays_within_its_own_noise(case: str) -> None:
    """bf16 autocast: the distance to fp32 is at most twice the distance that stock has."""
    adapter, changes = ADAPTERS[case]
    exact_loss, exact = step(small("gemma2", False, adapter, **changes))
    stock_loss, stock = step(small("gemma2", False, adapter, **changes), autocast=True)
    loss, ours = step(small("gemma2", True, adapter, **changes), autocast=True)
    assert {n: g.dtype for n, g in ours.items()} == {n: g.dtype for n, g in stock.items()}
    assert apart(loss, exact_loss) <= 2 * apart(stock_loss, exact_loss) + 1e-3
    assert gradients_apart(stock, exact) > 0
    assert gradients_apart(ours, exact) <= 2 * gradients_apart(stock, exact)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ["tied", "trained head", "LoRA on the head", "DoRA on the head"])
def test_fused_protocol_equals_full_logits(family: str, case: str, temperature: float) -> None:
    """log_probs, entropy, is_top1 and the gradients through both, against softmax over stock's own logits."""
    adapter, changes = ADAPTERS[case]
    batch = ragged()
    labels = batch.pop("labels")
    mask = labels[:, 1:] != -100
    found = []
    for hasten in (False, True):
        model = small(family, hasten, adapter, **changes)
        torch.manual_seed(11)
        if hasten:
            add_fused_lm_head(causal_lm_of(model), temperature=temperature, outputs=("log_probs", "entropy", "is_top1"))
            out = model(**batch, labels=labels, fused_lm_head=True)
            assert torch.equal(out.label_mask, mask)
            scores = (out.log_probs, out.entropy, out.is_top1)
            assert apart(out.loss.detach()[None], -(out.log_probs.detach().sum() / mask.sum())[None]) < ALLOWED
        else:
            log_p = (model(**batch).logits[:, :-1].float() / temperature).log_softmax(-1)
            picked = log_p.gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
            entropy = -(log_p.exp() * log_p).sum(-1)
            top = log_p.argmax(-1) == labels[:, 1:]
            scores = (picked * mask, entropy * mask, top & mask)
        (scores[0].sum() / 7 + 0.3 * scores[1].sum()).backward()
        found.append((scores, gradients_of(model)))
    (stock, stock_gradients), (ours, gradients) = found
    torch.testing.assert_close(ours[0], stock[0], rtol=ALLOWED, atol=ALLOWED)
    torch.testing.assert_close(ours[1], stock[1], rtol=ALLOWED, atol=ALLOWED)
    assert torch.equal(ours[2], stock[2])
    assert gradients_apart(gradients, stock_gradients) < ALLOWED


def test_fp32_head_under_autocast_computes_in_fp32() -> None:
    """TRL's cast_lm_head_to_fp32: the projection leaves autocast."""
    batch = ragged()
    labels = batch["labels"][:, 1:]
    model = small("llama", True)
    add_fused_lm_head(model, cast_lm_head_to_fp32=True)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        out = model(**batch, fused_lm_head=True)
    log_p = (hidden.float() @ model.lm_head.weight.T)[:, :-1].log_softmax(-1)
    picked = log_p.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(out.log_probs, picked * (labels != -100), rtol=ALLOWED, atol=ALLOWED)


class LargestLogits(TorchDispatchMode):
    """Records the most rows that any tensor with a last dimension of the vocabulary's size has had."""

    def __init__(self, ours: set[int]) -> None:
        super().__init__()
        self.rows, self.weights = 0, ours

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            is_logits = isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY
            if is_logits and tensor.is_floating_point() and tuple(tensor.shape) not in self.weights:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return out


@pytest.mark.grid(1)
@pytest.mark.parametrize("case", ["tied", "tied, full", "trained head", "LoRA on the head", "DoRA on the head"])
@pytest.mark.parametrize("fused_protocol", [False, True])
def test_full_logits_never_exist_in_a_step(case: str, fused_protocol: bool) -> None:
    """More tokens than a chunk has: nothing of vocabulary width may have more rows than one chunk, gradients included."""
    adapter, changes = ADAPTERS[case]
    chunk = ScoreConfig().chunk
    ids = torch.randint(6, 262, (2, chunk + 8))
    changes = {**changes, "max_position_embeddings": chunk + 8, "num_hidden_layers": 1}
    weights = {(64, VOCABULARY), (4, VOCABULARY)}  # a head's weight or LoRA B, transposed
    found = {}
    for hasten in (False, True):
        model = small("llama", hasten, adapter, **changes)
        with LargestLogits(weights) as largest:
            if hasten and fused_protocol:
                model(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
            else:
                model(input_ids=ids, labels=ids).loss.backward()
        found[hasten] = largest.rows
    assert found[False] >= 2 * (chunk + 7), "stock makes them, so this test can see them"
    assert 0 < found[True] <= chunk


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated in `SFTTrainer`:FutureWarning")
@pytest.mark.parametrize("adapter", [lora(), None], ids=["LoRA", "full"])
@pytest.mark.parametrize("make", [sft, hf], ids=["SFT", "Trainer"])
def test_label_smoothing_is_stocks(make: Any, adapter: LoraConfig | None, tmp_path: Path) -> None:
    """It needs real logits, and the Trainer decides by the model's name whether labels are shifted."""
    found = []
    for hasten in (False, True):
        recorder = Recorder()
        trainer = make(
            small("llama", hasten, adapter),
            rows(8, seed=6),
            tmp_path,
            {"callbacks": [recorder]},
            label_smoothing_factor=0.1,
        )
        trainer.train()
        found.append((logged(trainer, "loss"), recorder.gradients[0]))
    (stock_loss, stock), (loss, ours) = found
    assert apart(loss, stock_loss) < ALLOWED and gradients_apart(ours, stock) < ALLOWED
