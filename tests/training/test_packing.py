"""Packed and padding-free training as TRL does it: every document is what it is alone, on every attention backend.

"triton" is hasten's own choice, forced on a CPU (Triton's interpreter), in tiles so small that every row has several.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from device_kit import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from training_kit import Recorder, apart, gradients_apart, gradients_of, logged, lora, on_cpu, rows, small
from trl import SFTTrainer

from hasten.data import check_dataset
from hasten.ops.backend import ATTENTION, interpreted_kernels
from hasten.overlays import AttentionOverlay
from hasten.testing import tiny_tokenizer
from hasten.training import sft_config

WINDOW = 8
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"max_window_layers": 1},
    "gemma2": {},
    "gemma3_text": ALTERNATING,
    "cohere2": ALTERNATING,
}
CAPPED = "gemma2"
"""Its softcap on scores is nothing that sdpa can do, so eager is its default."""
STOCKS = [(f, b) for f in FAMILIES for b in ("eager", "sdpa") if (f, b) != (CAPPED, "sdpa")]
OURS = [("llama", "triton"), (CAPPED, "triton"), ("cohere2", "triton")]
"""The interpreter takes seconds a case; tests/families/test_attention_backends.py has every family."""
HOW = {
    "packing": {"packing": True, "max_length": 40},
    "split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 20},
    "padding_free": {"padding_free": True},
}
CASES = [(*case, how) for case in STOCKS for how in HOW] + [(*case, "packing") for case in OURS]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an attention backend, which `model_on` then runs."""
    if request.param != "triton":
        yield request.param
        return
    with interpreted_kernels(ATTENTION):
        yield request.param


def model_on(family: str, backend: str, hasten: bool = True) -> Any:
    replaced = "eager" if family == CAPPED else "sdpa"  # hasten's choice runs in place of the default
    named = replaced if backend == "triton" else backend
    return small(family, hasten, lora(), attention=named, **FAMILIES[family]).to(DEVICE)


def trainer_of(model: Any, data: Any, folder: Path, **settings: Any) -> SFTTrainer:
    """TRL's trainer with hasten's config, for one step of plain SGD without clipping."""
    changes = {
        "output_dir": str(folder), "max_steps": 1, "max_grad_norm": 0.0, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "optim": "sgd", **settings,
    }  # fmt: skip
    made = SFTTrainer(
        model=model, args=sft_config(model, **changes), train_dataset=data, processing_class=tiny_tokenizer(),
        callbacks=[Recorder()],
    )  # fmt: skip
    return on_cpu(made)


def gradients_seen(trainer: SFTTrainer) -> list[dict[str, torch.Tensor]]:
    return next(c.gradients for c in trainer.callback_handler.callbacks if isinstance(c, Recorder))


def first_batch(model: Any, folder: Path, how: str) -> dict[str, Any]:
    settings = {"per_device_train_batch_size": 2 if how == "packing" else 4, **HOW[how]}
    batch = next(iter(trainer_of(model, rows(9, seed=3), folder, **settings).get_train_dataloader()))
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def documents(batch: dict[str, Any]) -> list[slice]:
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["position_ids"].shape[1]]
    return [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def scores(model: Any, **batch: Any) -> torch.Tensor:
    """(T - 1,): the log-probability of each next token of a row (1, T), from real logits."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(-1, batch["input_ids"][0, 1:, None])[:, 0]


@pytest.mark.grid(1)
@pytest.mark.parametrize(("family", "backend", "how"), CASES, indirect=["backend"])
def test_losses_and_gradients_are_those_of_stock_on_each_document_alone(
    family: str, backend: str, how: str, tmp_path: Path
) -> None:
    ours, stock = model_on(family, backend), model_on(family, "eager", hasten=False)
    batch = first_batch(ours, tmp_path, how)
    parts, ids, labels = documents(batch), batch["input_ids"], batch["labels"]
    lengths = [p.stop - p.start for p in parts]
    assert ids.shape[0] == 1 and len(parts) >= 3 and max(lengths) > WINDOW and len(set(lengths)) > 1

    learned = labels[0, 1:] != -100
    packed = scores(ours, **batch)
    alone = [scores(stock, input_ids=ids[:, part]) for part in parts]
    for part, one in zip(parts, alone, strict=True):
        torch.testing.assert_close(packed[part.start : part.stop - 1], one, rtol=2e-5, atol=2e-5)
    count = int(learned.sum())
    loss = torch.cat([(a * learned[p.start : p.stop - 1]).sum()[None] for p, a in zip(parts, alone, strict=True)])
    (-loss.sum() / count).backward()

    out = ours(**batch, fused_lm_head=True)  # as TRL asks for it
    torch.testing.assert_close(out.log_probs[0], packed.detach() * learned, rtol=2e-5, atol=2e-5)
    (-out.log_probs.sum() / count).backward()
    assert gradients_apart(gradients_of(ours), gradients_of(stock)) < 1e-4


@pytest.mark.grid(1)
@pytest.mark.parametrize(("family", "backend", "how"), CASES, indirect=["backend"])
def test_a_document_that_changes_leaves_the_others_logits_bit_for_bit(
    family: str, backend: str, how: str, tmp_path: Path
) -> None:
    model = model_on(family, backend)
    batch = {k: v for k, v in first_batch(model, tmp_path, how).items() if k != "labels"}
    changed = documents(batch)[1]
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, changed] = (batch["input_ids"][:, changed] + 7) % 250 + 6
    with torch.no_grad():
        before, after = (model(**one, use_cache=False).logits[0] for one in (batch, other))
    assert not torch.equal(before[changed], after[changed])
    for kept in (slice(0, changed.start), slice(changed.stop, None)):
        assert before[kept].numel() and torch.equal(before[kept], after[kept])


@pytest.mark.grid(1)
@pytest.mark.parametrize(
    ("family", "backend", "how"),
    [
        *(
            (f, b, how)
            for f, b in STOCKS
            if b == "sdpa"
            for how in ("packing", "accumulated", "padding_free", "aligned")
        ),
        pytest.param(CAPPED, "triton", "packing", marks=pytest.mark.full),
    ],
    indirect=["backend"],
)
def test_a_packed_step_is_the_padded_step_of_the_same_rows(family: str, backend: str, how: str, tmp_path: Path) -> None:
    """Loss, gradients, and the count of tokens that TRL logs but for padding: 8 rows, weighed by their labels."""
    packed = {"packing": True, "max_length": 96}
    settings: dict[str, Any] = {
        "packing": {**packed, "per_device_train_batch_size": 8},
        "accumulated": {**packed, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        "padding_free": {"padding_free": True, "per_device_train_batch_size": 8},
        "aligned": {"padding_free": True, "per_device_train_batch_size": 8, "pad_to_multiple_of": 64},
    }[how]
    data = rows(8, seed=5)
    padded = trainer_of(model_on(family, backend), data, tmp_path, per_device_train_batch_size=8)
    ours = trainer_of(model_on(family, backend), data, tmp_path, **settings)
    if "packing" in settings:
        assert 1 < len(ours.train_dataset) < len(data)
        assert len({sum(row["seq_lengths"]) for row in ours.train_dataset}) > 1, "a last row that is not full"
    for trainer in (padded, ours):
        trainer.train()
    assert apart(logged(ours, "loss"), logged(padded, "loss")) < 1e-5
    found, expected = (gradients_seen(trainer) for trainer in (ours, padded))
    assert len(found) == 1 and gradients_apart(found[0], expected[0]) < 1e-4
    real = sum(len(row["input_ids"]) for row in data)
    tokens = [int(logged(trainer, "num_tokens")[-1]) for trainer in (ours, padded)]
    assert tokens == [-(-real // 64) * 64 if how == "aligned" else real, real]


@pytest.mark.grid(1)
@pytest.mark.parametrize(("family", "backend"), [*STOCKS, (CAPPED, "triton")], indirect=["backend"])
def test_wrapped_rows_are_trained_as_stock_trains_them(family: str, backend: str, tmp_path: Path) -> None:
    """TRL's "wrapped" cuts one long stream into rows, whose documents see each other in every library."""
    settings = {"packing": True, "packing_strategy": "wrapped", "max_length": 32, "per_device_train_batch_size": 8}
    losses = []
    for hasten, name in ((True, backend), (False, "eager")):
        trainer = trainer_of(model_on(family, name, hasten), rows(8, seed=5), tmp_path, **settings)
        lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
        assert lengths[:-1] == [32] * (len(lengths) - 1) and 0 < lengths[-1] < 32, "a last row that is not full"
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert apart(*losses) < 1e-5


class Shapes(TorchDispatchMode):
    """The largest two last dimensions of everything that is made, as sets of shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.made.add(tuple(one.shape[-2:]))
        return out


@pytest.mark.grid(1)
@pytest.mark.parametrize("how", ["packing", "padding_free"])
@pytest.mark.parametrize(("family", "backend"), [*OURS, ("llama", "sdpa")], indirect=["backend"])
def test_no_dense_mask_is_made(family: str, backend: str, how: str, tmp_path: Path) -> None:
    """Three numbers a token, one tensor for all layers, and nothing of T x T, forward and backward; sdpa gets a dense one."""
    if backend == "sdpa" and DEVICE == "cuda":
        pytest.skip("hasten's choice runs in its place there")
    model = model_on(family, backend)
    batch = first_batch(model, tmp_path, how)
    tokens, masks, contexts = batch["input_ids"].shape[1], [], []
    for module in model.modules():
        if isinstance(module, AttentionOverlay):
            module.register_forward_pre_hook(lambda m, a, kw: masks.append(kw["attention_mask"]), with_kwargs=True)
            module.register_forward_pre_hook(
                lambda m, a, kw: contexts.append(kw.get("attention_context")), with_kwargs=True
            )
    with Shapes() as shapes:
        model(**batch, use_cache=False, fused_lm_head=True).log_probs.sum().backward()
    assert len(masks) == 2
    if backend == "triton":
        assert contexts[0] is contexts[1] and masks[0] is masks[1] and masks[0].numel() == 0
        spans = contexts[0].spans_BT3
        assert spans.shape == (1, tokens, 3) and spans.dtype == torch.int32
    else:
        assert masks[0].shape == (1, 1, tokens, tokens) and contexts == [None, None]
    assert ((tokens, tokens) in shapes.made) == (backend != "triton")


def test_what_packing_cuts_is_counted(tmp_path: Path) -> None:
    data = rows(9, seed=3)
    long = sum(max(0, len(row["input_ids"]) - 12) for row in data)
    lost = {}
    for strategy in ("bfd", "bfd_split", "wrapped"):
        settings = {"packing": True, "packing_strategy": strategy, "max_length": 12}
        trainer = trainer_of(small("llama", True, lora()), data, tmp_path, **settings)
        counted = check_dataset(data, trainer)
        kept = sum(len(row["input_ids"]) for row in trainer.train_dataset)
        lost[strategy] = (counted.lost, sum(len(row["input_ids"]) for row in data) - kept)
    assert long > 0 and lost == {"bfd": (long, long), "bfd_split": (0, 0), "wrapped": (0, 0)}
