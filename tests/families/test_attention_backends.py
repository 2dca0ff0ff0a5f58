"""hasten's own attention in whole models: packed and padded sequences, windows, caches, and what leaves it alone.

On the CPU the choice is forced and its kernels run in Triton's interpreter; everything else of the models runs as ever
there. On a GPU nothing is forced. Rows have several tiles (`FP32`), the last one not full.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from device_kit import DEVICE
from transformers import StaticCache
from transformers_kit import recompute

from hasten.errors import InputError
from hasten.ops.attention.kernels.tiles import FP32
from hasten.ops.backend import ATTENTION, interpreted_kernels
from hasten.overlays import AttentionOverlay, BackboneOverlay, SpanAttention
from hasten.overlays.cache_name import CACHE
from hasten.patching import apply, plan, report, restore
from hasten.patching.apply import put_overlay
from hasten.testing import relative_error, tiny_model

FAMILIES = ["llama", "mistral", "qwen2", "gemma2", "gemma3_text", "cohere2"]
LENGTHS = (17, 1, 22)
TOKENS = sum(LENGTHS)
assert FP32.fwd.queries < TOKENS < 2 * FP32.fwd.queries
IDS = torch.randint(6, 288, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(DEVICE)
RESTARTS = torch.cat([torch.arange(n) for n in LENGTHS])[None].to(DEVICE)
STARTS = torch.tensor([0, 17, 18, 40], dtype=torch.int32, device=DEVICE)
SLIDING_AND_FULL = {
    "qwen2": {"max_window_layers": 1},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.fixture
def chosen() -> Iterator[None]:
    """hasten's choice of attention for every tensor, as on a GPU."""
    with interpreted_kernels(ATTENTION):
        yield


def twins(name: str, **changes: Any) -> tuple[Any, Any]:
    """(patched, stock with eager attention), of two layers."""
    make = {"num_hidden_layers": 2, **SLIDING_AND_FULL.get(name, {}), **changes}
    stock = tiny_model(name, **{**make, "attn_implementation": "eager"}).to(DEVICE)
    ours = tiny_model(name, **make).to(DEVICE)
    apply(ours)
    return ours, stock


def contexts_seen(model: Any) -> list[Any]:
    """The attention context that each attention gets (None = transformers' interface), filled in as the model runs."""
    seen: list[Any] = []
    for module in model.modules():
        if isinstance(module, AttentionOverlay):
            module.register_forward_pre_hook(
                lambda m, a, kw: seen.append(kw.get("attention_context")), with_kwargs=True
            )
    return seen


def gradients(model: Any, logits: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logits * upstream).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def alone(stock: Any) -> torch.Tensor:
    """(1, T, V): the documents' logits, each from a row of its own."""
    return torch.cat([stock(part, use_cache=False).logits for part in IDS.split(LENGTHS, dim=1)], dim=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_are_what_they_are_alone(name: str, chosen: None) -> None:
    ours, stock = twins(name)
    seen = contexts_seen(ours)
    logits = ours(IDS, position_ids=RESTARTS).logits
    assert len(seen) == 2 and isinstance(seen[0], SpanAttention) and seen[1] is seen[0]
    assert seen[0].spans_BT3.dtype == torch.int32 and seen[0].spans_BT3.shape == (1, TOKENS, 3)
    expected = alone(stock)
    assert relative_error(logits, expected) < 2e-5
    upstream = torch.randn(logits.shape, device=DEVICE)
    mine, theirs = gradients(ours, logits, upstream), gradients(stock, expected, upstream)
    assert mine.keys() == theirs.keys()
    for parameter, gradient in theirs.items():
        assert relative_error(mine[parameter], gradient) < 2e-4, parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_a_document_that_changes_leaves_the_others_bit_for_bit(name: str, chosen: None) -> None:
    ours, _ = twins(name)
    changed = IDS.clone()
    changed[:, 2:17] = 7
    with torch.no_grad():
        before, after = (ours(ids, position_ids=RESTARTS).logits for ids in (IDS, changed))
    assert torch.equal(before[:, 17:], after[:, 17:]) and not torch.equal(before[:, :17], after[:, :17])


@pytest.mark.parametrize("ways", [{"position_ids": RESTARTS}, {"position_ids": RESTARTS, "cu_seq_lens_q": STARTS}])
@pytest.mark.parametrize("mask", [None, torch.ones_like(IDS)])
def test_however_packing_is_said(ways: dict[str, Any], mask: torch.Tensor | None, chosen: None) -> None:
    """transformers itself overlooks packing beside a mask, and beside the cache that evaluation makes by default."""
    ours, stock = twins("mistral")
    with torch.no_grad():
        assert relative_error(ours(IDS, attention_mask=mask, **ways).logits, alone(stock)) < 2e-5


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "cohere2"])
def test_windows_agree_with_eager_to_the_token(name: str, chosen: None) -> None:
    """And a window one longer or shorter shows."""
    ours, stock = twins(name)
    with torch.no_grad():
        expected = stock(IDS).logits
        assert relative_error(ours(IDS).logits, expected) < 2e-5
        for wrong in (7, 9):
            for module in ours.modules():
                if isinstance(module, AttentionOverlay) and module.overlay_config.window is not None:
                    overlay_config = replace(module.overlay_config, window=wrong)
                    put_overlay(module, AttentionOverlay, overlay_config)
            assert relative_error(ours(IDS).logits, expected) > 1e-3


@pytest.mark.grid(1)
@pytest.mark.parametrize("positioned", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padded_batches_are_what_their_rows_are_alone(name: str, side: str, positioned: bool, chosen: None) -> None:
    ours, stock = twins(name)
    lengths = (TOKENS, 10, 3)
    ids = IDS.expand(3, -1)
    place = torch.arange(TOKENS, device=DEVICE)
    real = [place >= TOKENS - n if side == "left" else place < n for n in lengths]
    mask = torch.stack(real).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if positioned else None
    with torch.no_grad():
        batch = ours(ids, attention_mask=mask, position_ids=positions).logits
        assert bool(batch.isfinite().all())
        for row, where in enumerate(real):
            expected = stock(ids[row : row + 1, where]).logits[0]
            assert relative_error(batch[row, where], expected) < 2e-5, row


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_over_a_cache_is_the_full_forward(name: str, chosen: None) -> None:
    ours, stock = twins(name)
    seen = contexts_seen(ours)
    past, steps = None, []
    with torch.no_grad():
        for part in (IDS[:, :36], *IDS[:, 36:].split(1, dim=1)):
            outputs = ours(part, **{CACHE: past}, use_cache=True)
            past = outputs[CACHE]
            steps.append(outputs.logits)
        assert relative_error(torch.cat(steps, dim=1), stock(IDS).logits) < 2e-5
    assert all(isinstance(context, SpanAttention) for context in seen[:2])  # the prefill
    assert len(seen) > 2 and all(context is None for context in seen[2:])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_from_left_padded_prompts(cache: str, chosen: None) -> None:
    ours, stock = twins("gemma2")
    mask = torch.ones(2, 12, dtype=torch.long, device=DEVICE)
    mask[1, :7] = 0
    how = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    prompts = IDS[:, :12].expand(2, -1)
    both = [model.generate(prompts, attention_mask=mask, **how) for model in (ours, stock)]
    assert torch.equal(*both)


def test_a_static_cache_and_a_mask_of_the_callers_own_go_transformers_way(chosen: None) -> None:
    ours, stock = twins("llama")
    seen = contexts_seen(ours)
    own = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool, device=DEVICE).tril().triu(-3)
    with torch.no_grad():
        cache = StaticCache(ours.config, max_cache_len=50)
        logits = ours(IDS, **{CACHE: cache}).logits
        assert relative_error(logits, stock(IDS).logits) < 2e-5
        additive = torch.zeros(own.shape, device=DEVICE).masked_fill(~own, torch.finfo(torch.float32).min)
        assert relative_error(ours(IDS, attention_mask=own).logits, stock(IDS, attention_mask=additive).logits) < 2e-5
    assert seen and all(context is None for context in seen)


def test_training_with_recompute_and_labels(chosen: None) -> None:
    ours, stock = twins("mistral", use_cache=False)
    labels = IDS.masked_fill(RESTARTS == 0, -100)
    recompute(ours.train())
    ours(IDS, position_ids=RESTARTS, labels=labels).loss.backward()
    logits = alone(stock.train())
    torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, theirs[name].grad) < 2e-4, name


def test_under_autocast_scores_are_as_exact_as_transformers(chosen: None) -> None:
    ours, stock = twins("mistral")
    with torch.no_grad():
        exact = stock(IDS).logits
        with torch.autocast(DEVICE, torch.bfloat16):
            mine, theirs = (model(IDS).logits for model in (ours, stock))
    assert relative_error(mine, exact) < 2 * relative_error(theirs, exact)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_backend_that_the_user_named_runs(name: str, chosen: None) -> None:
    ours = tiny_model("llama", num_hidden_layers=2, attn_implementation=name).to(DEVICE)
    stock = copy.deepcopy(ours)
    apply(ours, plan(ours, attn_implementation=name))
    seen = contexts_seen(ours)
    with torch.no_grad():
        assert relative_error(ours(IDS).logits, stock(IDS).logits) < 2e-5
    assert seen and all(context is None for context in seen)
    assert f"{name} attention" in report(ours).title
    assert any(row.why.endswith(f"attn_implementation={name!r} was asked for") for row in report(ours).rows)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_transformers_backends_isolate_documents_or_raise(name: str) -> None:
    ours = tiny_model("mistral", num_hidden_layers=2, attn_implementation=name).to(DEVICE)
    stock = copy.deepcopy(ours)
    apply(ours, plan(ours, attn_implementation=name))
    ones, padded = torch.ones_like(IDS), torch.ones_like(IDS)
    padded[:, -2:] = 0
    with torch.no_grad():
        expected = alone(stock)
        for mask in (None, ones):
            assert relative_error(ours(IDS, attention_mask=mask, position_ids=RESTARTS).logits, expected) < 2e-5
        with pytest.raises(InputError, match="attention_mask with padding was given"):
            ours(IDS, attention_mask=padded, position_ids=RESTARTS)
        with pytest.raises(InputError, match="pass use_cache=False"):
            ours(IDS, position_ids=RESTARTS, use_cache=True)
        with pytest.raises(InputError, match="without position_ids"):
            ours(IDS, cu_seq_lens_q=STARTS)
        # What is no packing passes: padding positions, a cache, plain positions.
        left = 1 - padded.flip(1)
        left = 1 - left
        positions = (left.cumsum(-1) - 1).clamp(min=0)
        given = {"attention_mask": left, "position_ids": positions, "use_cache": True}
        assert relative_error(ours(IDS, **given).logits, stock(IDS, **given).logits) < 2e-5


def test_dropout_and_weights_that_are_asked_for_go_transformers_way(chosen: None) -> None:
    ours, _ = twins("gemma2", attention_dropout=0.5)
    seen = contexts_seen(ours)
    ours.train()(IDS)
    assert seen and all(context is None for context in seen)
    weights = ours.eval()(IDS, output_attentions=True).attentions
    assert len(weights) == 2 and weights[0].shape == (1, 4, TOKENS, TOKENS)
    ours(IDS)
    assert isinstance(seen[-1], SpanAttention)


def test_nothing_is_left_behind(chosen: None, tmp_path: Any) -> None:
    ours, stock = twins("mistral", attn_implementation="sdpa")
    ours.save_pretrained(tmp_path / "ours")
    restore(ours)
    assert not any(isinstance(module, (BackboneOverlay, AttentionOverlay)) for module in ours.modules())
    ours.save_pretrained(tmp_path / "stock")
    assert (tmp_path / "ours" / "config.json").read_text() == (tmp_path / "stock" / "config.json").read_text()
    assert ours.config._attn_implementation == "sdpa"


def test_the_report_names_the_choice(chosen: None) -> None:
    for name, title, reason in (
        (
            "llama",
            "torch sdpa and Triton attention",
            "sdpa for plain causal sequences of a multiple of 64 tokens, Triton for packed and padded sequences, other lengths",
        ),
        ("cohere2", "torch sdpa and Triton attention", "Triton for windows of 8 in 1 of 2 layers, packed"),
        ("gemma2", "Triton attention", "softcap on scores"),
    ):
        ours, _ = twins(name)
        found = report(ours)
        rows = [row for row in found.rows if row.runs.startswith("attention by")]
        assert title in found.title and len(rows) == 1 and reason in rows[0].why


@pytest.mark.skipif(DEVICE == "cuda", reason="what runs without a GPU")
def test_without_a_gpu_nothing_changes() -> None:
    ours, _ = twins("llama")
    seen = contexts_seen(ours)
    ours(IDS)
    assert seen and all(context is None for context in seen)
    rows = [row for row in report(ours).rows if row.runs == "attention by sdpa"]
    assert len(rows) == 1 and "on a GPU" in rows[0].why


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_the_host_never_waits(name: str) -> None:
    ours, _ = twins(name)
    ones = torch.ones_like(IDS)
    rows = [
        {},
        {"attention_mask": ones},
        {"position_ids": RESTARTS},
        {"cu_seq_lens_q": STARTS, "position_ids": RESTARTS},
    ]
    try:
        for mode in ("default", "error"):  # the first time compiles
            torch.cuda.set_sync_debug_mode(mode)
            for given in rows:
                ours.model(input_ids=IDS, use_cache=False, **given).last_hidden_state.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
