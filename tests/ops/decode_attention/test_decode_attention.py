"""Decode attention over a blocked cache equals attention over the whole sequence, on both backends."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from device_kit import DEVICE, ON_GPU
from ops_kit import both, poisoned_memory

from hasten.ops import NormConfig, QKNorm, qk_rope
from hasten.ops.decode_attention import LARGEST, CacheView, NewToken, attend_new_token, decode_attention, write_cache


@dataclass(frozen=True)
class Case:
    """lengths: cached tokens of each sequence. starts: padding on its left. size: tokens per block."""

    lengths: tuple[int, ...] = (5,)
    starts: tuple[int, ...] = (0,)
    new: int = 1
    heads: int = 4
    kv: int = 2
    dim: int = 16
    window: int | None = None
    softcap: float | None = None
    size: int = 64


CASES = {
    "one token": Case(),
    "an empty cache": Case((0,), (0,), new=3),
    "the last slot of a block": Case((63,)),
    "the first slot of a block": Case((64,)),
    "across blocks": Case((62,), new=5),
    "ragged": Case((130, 7, 65), (3, 0, 64)),
    "padding only before the new token": Case((70, 3), (70, 3)),
    "padding beyond the new token": Case((4,), (9,)),
    "groups of 8, several tokens": Case((100, 20), (0, 2), new=4, heads=8, kv=1),
    "one head per group": Case((90,), heads=3, kv=3, dim=80),
    "window": Case((200, 150), (0, 149), window=70, new=3),
    "window of one": Case((130,), window=1),
    "window beyond the cache": Case((40,), window=1000),
    "softcap": Case((80,), softcap=2.0, dim=128),
    "256 channels": Case((66,), heads=2, kv=1, dim=256, new=16),
}


def cache_of(case: Case, dtype: torch.dtype) -> tuple[CacheView, torch.Tensor, torch.Tensor]:
    """(a cache whose unwritten slots are NaN, all keys, all values (B, longest, K, D))."""
    generator = torch.Generator().manual_seed(0)
    width = max(case.lengths) + case.new
    keys, values = (
        torch.randn(len(case.lengths), width, case.kv, case.dim, generator=generator).to(DEVICE, dtype)
        for _ in range(2)
    )
    count = -(-width // case.size)
    blocks = [
        torch.full((2, len(case.lengths), case.kv, case.size, case.dim), float("nan"), device=DEVICE, dtype=dtype)
        for _ in range(count)
    ]
    table = torch.tensor([b.data_ptr() for b in blocks] + [0, 0], dtype=torch.int64, device=DEVICE)
    slots, starts = (torch.tensor(v, dtype=torch.int32, device=DEVICE) for v in (case.lengths, case.starts))
    cache = CacheView(blocks, table, torch.zeros_like(slots), starts)
    for b, length in enumerate(case.lengths):  # as earlier forwards left it
        for slot in range(length):
            block, row = divmod(slot, case.size)
            blocks[block][0, b, :, row], blocks[block][1, b, :, row] = keys[b, slot], values[b, slot]
    return replace(cache, slots_B=slots), keys, values


def expected(case: Case, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A loop over sequences and new tokens, in fp64."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for b, length in enumerate(case.lengths):
        for t in range(case.new):
            first = case.starts[b] if case.window is None else max(case.starts[b], length + t - case.window + 1)
            if first > length + t:
                continue
            k, v = (
                x[b, first : length + t + 1].double().repeat_interleave(case.heads // case.kv, 1)
                for x in (keys, values)
            )
            scores = torch.einsum("hd,shd->hs", q[b, t].double(), k) * 0.3
            if case.softcap is not None:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            out[b, t] = torch.einsum("hs,shd->hd", scores.softmax(-1), v)
    return out


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_attention_over_the_whole_sequence(backend: Any, case: str, dtype: torch.dtype) -> None:
    sizes = CASES[case]
    cache, keys, values = cache_of(sizes, dtype)
    new = torch.stack([torch.arange(n, n + sizes.new) for n in sizes.lengths]).to(DEVICE)[:, :, None, None]
    k, v = (x.take_along_dim(new, 1) for x in (keys, values))
    write_cache(k, v, cache, backend)
    q = torch.randn(len(sizes.lengths), sizes.new, sizes.heads, sizes.dim, generator=torch.Generator().manual_seed(1))
    q = q.to(DEVICE, dtype)
    with poisoned_memory():
        out = decode_attention(q, cache, 0.3, sizes.window, sizes.softcap, backend)
    exact = expected(sizes, q, keys, values)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    limit = 2e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(out.double(), exact, rtol=limit, atol=limit)


@both
def test_writes_only_the_new_slots(backend: Any) -> None:
    case = Case((62, 3), (0, 0), new=4)
    cache, keys, values = cache_of(case, torch.float32)
    before = [block.clone() for block in cache.blocks]
    k, v = torch.randn(2, 4, 2, 16, device=DEVICE), torch.randn(2, 4, 2, 32, device=DEVICE)[..., :16]
    write_cache(k, v, cache, backend)
    for b, length in enumerate(case.lengths):
        for t in range(4):
            block, row = divmod(length + t, case.size)
            assert torch.equal(cache.blocks[block][0, b, :, row], k[b, t])
            assert torch.equal(cache.blocks[block][1, b, :, row], v[b, t])
            cache.blocks[block][:, b, :, row] = before[block][:, b, :, row]
    assert all(
        torch.equal(a, b) or torch.equal(a.isnan(), b.isnan()) for a, b in zip(cache.blocks, before, strict=True)
    )


@both
def test_takes_one_sequence_of_a_larger_cache(backend: Any) -> None:
    case = CASES["ragged"]
    cache, keys, values = cache_of(case, torch.float32)
    q = torch.randn(3, 1, case.heads, case.dim, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    exact = expected(case, q, keys, values)
    for b, length in enumerate(case.lengths):
        part = slice(b, b + 1)
        blocks = [block[:, part] for block in cache.blocks]
        table = torch.tensor([block.data_ptr() for block in blocks], dtype=torch.int64, device=DEVICE)
        alone = CacheView(blocks, table, cache.slots_B[part], cache.starts_B[part])
        others = [block[:, [other for other in range(3) if other != b]].clone() for block in cache.blocks]
        write_cache(keys[part, length : length + 1], values[part, length : length + 1], alone, backend)
        out = decode_attention(q[part], alone, 0.3, backend=backend)
        torch.testing.assert_close(out.double(), exact[part], rtol=2e-5, atol=2e-5)
        for block, before in zip(cache.blocks, others, strict=True):
            after = block[:, [other for other in range(3) if other != b]]
            assert torch.equal(after.nan_to_num(9.0), before.nan_to_num(9.0))


ROPES: dict[str, dict[str, Any]] = {
    "half": {},
    "interleaved, fp32": {"rotation": "interleaved", "fp32": True},
    "no rotation": {"position": None},
    "RMSNorm": {"norm": NormConfig(1e-6, "rms", True, True)},
    "LayerNorm per head": {"norm": NormConfig(1e-5, "layer", False, True), "rotation": "interleaved"},
}
STEPS = [
    *((case, "half") for case, sizes in CASES.items() if sizes.new == 1),
    *(("one head per group", rope) for rope in ROPES),
    *(("ragged", rope) for rope in ROPES),
    ("long", "half"),
]
CASES["long"] = Case((700, 300), (0, 299), heads=4, kv=1)


def token_of(case: Case, rope: dict[str, Any], dtype: torch.dtype) -> NewToken:
    """Slices of one buffer, as the projections give them."""
    batch, heads = len(case.lengths), case.heads + 2 * case.kv
    all_heads = torch.randn(batch, 1, heads, case.dim, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    angles = torch.rand(batch, 1, case.dim // 2, generator=torch.Generator().manual_seed(2)).to(DEVICE) * 3
    rope = dict(rope)
    wide = angles.repeat_interleave(2, -1) if rope.get("rotation") == "interleaved" else angles.repeat(1, 1, 2)
    table = wide if rope.get("fp32") else wide.to(dtype)
    found: dict[str, Any] = {"position": (table.cos(), table.sin())} | rope
    config = found.pop("norm", None)
    if config is not None:
        shape = [(n, case.dim) if config.kind == "layer" else (case.dim,) for n in (case.heads, case.kv)]
        found["qk_norm"] = QKNorm(*(torch.rand(one).to(DEVICE, dtype) for one in shape), config)
    return NewToken(*all_heads.split((case.heads, case.kv, case.kv), 2), **found)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "rope"), STEPS)
def test_a_new_token_in_one_launch(backend: Any, case: str, rope: str, dtype: torch.dtype) -> None:
    sizes = CASES[case]
    token = token_of(sizes, ROPES[rope], dtype)
    found = []
    for fused in (True, False):
        cache, *_ = cache_of(sizes, dtype)
        with poisoned_memory():
            if fused:
                out = attend_new_token(token, cache, 0.3, sizes.window, sizes.softcap, backend)
            else:
                rotated = qk_rope(
                    token.q_B1HD, token.k_B1KD, token.position, token.rotation, token.fp32, token.qk_norm, backend
                )
                write_cache(rotated[1], token.v_B1KD, cache, backend)
                out = decode_attention(rotated[0], cache, 0.3, sizes.window, sizes.softcap, backend)
        found.append((out, cache))
    (ours, mine), (apart, theirs) = found
    assert (ours.shape, ours.dtype) == (token.q_B1HD.shape, dtype) and ours.is_contiguous()
    limit = 2e-5 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(ours, apart, rtol=limit, atol=limit)
    unread = [start > length for start, length in zip(sizes.starts, sizes.lengths, strict=True)]
    for one, other in zip(mine.blocks, theirs.blocks, strict=True):
        same = (one == other) | (one.isnan() & other.isnan())
        if dtype == torch.bfloat16:  # the interpreter truncates where torch rounds
            same |= (one.float() - other.float()).abs() <= 2**-7 * other.float().abs()
        else:
            same |= (one - other).abs() <= 1e-6
        assert all(bool(same[:, b].all()) for b, skipped in enumerate(unread) if not skipped)


@both
def test_counts_are_left_at_zero(backend: Any) -> None:
    sizes = CASES["long"]
    cache, *_ = cache_of(sizes, torch.float32)
    cache = replace(cache, counts=torch.zeros(2, dtype=torch.int32, device=DEVICE))
    token = token_of(sizes, {}, torch.float32)
    first = attend_new_token(token, cache, 0.3, backend=backend)
    assert cache.counts is not None and not bool(cache.counts.any())
    assert torch.equal(attend_new_token(token, cache, 0.3, backend=backend), first)


def needs_a_gpu(dtype: torch.dtype, backend: str) -> None:
    if dtype.is_floating_point and backend == "triton" and not ON_GPU:
        pytest.skip("Triton's interpreter loses the carry of a mantissa that rounds up when it converts to FP8")


def quantised_cache(sizes: Case, dtype: torch.dtype) -> CacheView:
    """The cache of `cache_of`, quantised by the reference; unwritten slots hold codes of garbage and NaN scales."""
    cache, keys, values = cache_of(sizes, torch.float32)
    blocks = [torch.full(block.shape, 100, device=DEVICE, dtype=torch.float32).to(dtype) for block in cache.blocks]
    scales = [torch.full(block.shape[:-1], float("nan"), device=DEVICE) for block in cache.blocks]
    tables = [torch.tensor([one.data_ptr() for one in kept], device=DEVICE) for kept in (blocks, scales)]
    made = CacheView(blocks, tables[0], torch.zeros_like(cache.slots_B), cache.starts_B, None, scales, tables[1])
    longest = max(sizes.lengths)
    if longest:
        write_cache(keys[:, :longest], values[:, :longest], made, "reference")
    return replace(made, slots_B=cache.slots_B)


@both
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("case", ["one token", "ragged", "window", "long", "an empty cache"])
def test_a_quantised_cache(backend: Any, case: str, dtype: torch.dtype) -> None:
    """Codes and scales are the reference's; attention is that over the dequantised cache."""
    needs_a_gpu(dtype, backend)
    sizes = CASES[case]
    mine, theirs = quantised_cache(sizes, dtype), quantised_cache(sizes, dtype)
    batch = len(sizes.lengths)
    k, v = (torch.randn(batch, sizes.new, sizes.kv, sizes.dim, device=DEVICE) for _ in range(2))
    q = torch.randn(batch, sizes.new, sizes.heads, sizes.dim, device=DEVICE)
    with poisoned_memory():
        write_cache(k, v, mine, backend)
        out = decode_attention(q, mine, 0.3, sizes.window, sizes.softcap, backend)
    write_cache(k, v, theirs, "reference")
    for name in ("blocks", "scales"):
        for one, other in zip(getattr(mine, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(
                one.float(), other.float(), rtol=0.13, atol=1.0 if name == "blocks" else 0.0, equal_nan=True
            )
    wanted = decode_attention(q, theirs, 0.3, sizes.window, sizes.softcap, "reference")
    torch.testing.assert_close(out, wanted, rtol=2e-3, atol=2e-3)


@both
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
@pytest.mark.parametrize("case", ["one token", "ragged", "long"])
def test_a_new_token_in_a_quantised_cache(backend: Any, case: str, dtype: torch.dtype) -> None:
    needs_a_gpu(dtype, backend)
    sizes = CASES[case]
    token = token_of(sizes, {}, torch.float32)
    found = []
    for kind in (backend, "reference"):
        cache = quantised_cache(sizes, dtype)
        found.append(attend_new_token(token, cache, 0.3, sizes.window, sizes.softcap, kind))
    torch.testing.assert_close(*found, rtol=2e-3, atol=2e-3)
