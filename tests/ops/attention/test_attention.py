"""Causal attention against an independent formula in fp64, and what no formula shows: isolation, strides, poison, choice."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from device_kit import DEVICE
from ops_kit import DTYPES, assert_as_good_as_torch, both, poisoned_memory

from hasten.ops.attention import attention, attention_backend, row_spans, visible_keys
from hasten.ops.attention.kernels.forward import attention as flash
from hasten.ops.attention.kernels.tiles import Tile, Tiles
from hasten.testing import relative_error

SMALL = Tiles(Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1))
"""Rows of a few dozen tokens are many tiles of these, of which some are cut by the diagonal, a window or a document."""


@dataclass(frozen=True)
class Rows:
    """documents: lengths of those in every row. padding: tokens before the second row's first one."""

    documents: tuple[int, ...]
    heads: int = 4
    kv: int = 4
    dim: int = 16
    window: int | None = None
    softcap: float | None = None
    padding: int = 0
    batch: int = 2

    @property
    def tokens(self) -> int:
        return sum(self.documents)

    def spans(self) -> torch.Tensor | None:
        mask = torch.ones(self.batch, self.tokens, dtype=torch.long)
        mask[1:, : self.padding] = 0
        positions = torch.cat([torch.arange(n) for n in self.documents])[None]
        return row_spans(
            (self.batch, self.tokens, torch.device(DEVICE)),
            mask if self.padding else None,
            positions if len(self.documents) > 1 else None,
        )

    def visible(self) -> torch.Tensor:
        """(B, 1, T, T) bool, written from the words of the contract, one pair at a time."""
        document = [index for index, n in enumerate(self.documents) for _ in range(n)]
        seen = torch.zeros(self.batch, 1, self.tokens, self.tokens, dtype=torch.bool)
        for b in range(self.batch):
            pad = self.padding if b else 0
            for t in range(self.tokens):
                for s in range(max(pad, t - (self.window or self.tokens) + 1), t + 1):
                    seen[b, 0, t, s] = document[s] == document[t]
        return seen.to(DEVICE)

    def draw(self) -> list[torch.Tensor]:
        return [torch.randn(self.batch, self.tokens, n, self.dim) for n in (self.heads, self.kv, self.kv)]

    def ours(self, backend: str, tiles: Tiles | None = SMALL) -> Any:
        arguments = (self.dim**-0.5 * 1.5, self.window, self.softcap, self.spans())
        if backend == "triton":
            return lambda q, k, v: flash(q, k, v, *arguments, tiles)
        return lambda q, k, v: attention(q, k, v, *arguments, backend=backend)  # pyright: ignore[reportArgumentType]

    def formula(self) -> Any:
        visible = self.visible()

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k, v = (x.repeat_interleave(self.heads // self.kv, 2) for x in (k, v))
            scores = torch.einsum("bthd,bshd->bhts", q, k) * (self.dim**-0.5 * 1.5)
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            weights = scores.where(visible, float("-inf")).softmax(-1).nan_to_num(0.0)
            return torch.einsum("bhts,bshd->bthd", weights, v)

        return run


CASES = {
    "plain": Rows((37,)),
    "groups of 4": Rows((33,), heads=4, kv=1, dim=64),
    "groups of 8": Rows((21,), heads=8, kv=1, dim=16),
    "80 channels": Rows((19,), heads=2, kv=1, dim=80),
    "128 channels": Rows((18,), heads=2, kv=2, dim=128, window=7),
    "256 channels": Rows((17,), heads=2, kv=1, dim=256, softcap=3.0),
    "window of 7": Rows((70,), kv=2, window=7),
    "window of 18": Rows((70,), kv=1, window=18),  # a query alone in the last tile that sees a key
    "window of 40": Rows((70,), kv=1, window=40),
    "window of the row": Rows((23,), window=23),
    "window beyond the row": Rows((23,), window=100, softcap=2.0),
    "softcap": Rows((50,), kv=2, softcap=2.0),
    "softcap out of reach": Rows((20,), softcap=50.0),
    "documents": Rows((13, 1, 1, 80, 5), heads=2, kv=1),
    "a document one longer than a tile": Rows((33, 9), kv=2),
    "documents, window, softcap": Rows((30, 1, 17), kv=2, window=7, softcap=2.0),
    "left padding": Rows((41,), kv=2, padding=18),
    "left padding, window": Rows((41,), kv=2, padding=35, window=7),
}


@pytest.mark.grid(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case: str, dtype: torch.dtype) -> None:
    rows = CASES[case]
    assert_as_good_as_torch(rows.ours("triton"), rows.formula(), rows.draw(), dtype)


@pytest.mark.parametrize("case", CASES)
def test_reference(case: str) -> None:
    rows = CASES[case]
    assert_as_good_as_torch(rows.ours("reference"), rows.formula(), rows.draw(), torch.float32)


@pytest.mark.grid(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 48, 128, 256])
def test_the_tables_own_tiles(dim: int, dtype: torch.dtype) -> None:
    rows = Rows((200, 1, 57) if DEVICE == "cuda" else (40, 1, 6), heads=2, kv=1, dim=dim, window=33)
    assert_as_good_as_torch(rows.ours("triton", None), rows.formula(), rows.draw(), dtype)


@both
@pytest.mark.parametrize("rows", [Rows((19,), kv=2, window=1), Rows((1,), kv=2), Rows((1, 1, 1), kv=2)], ids=str)
def test_a_token_that_sees_only_itself(rows: Rows, backend: str) -> None:
    """Its weight is one whatever the score, so the output is v and nothing flows to q and k."""
    q, k, v = (x.to(DEVICE).requires_grad_() for x in rows.draw())
    out = rows.ours(backend)(q, k, v)
    assert torch.equal(out, v.repeat_interleave(2, 2))
    upstream = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), upstream)
    assert float(dq.abs().max()) < 1e-5 and float(dk.abs().max()) < 1e-5
    torch.testing.assert_close(dv, upstream.unflatten(2, (2, 2)).sum(3))


def test_slices_of_one_buffer_and_turned_views_are_read_where_they_lie() -> None:
    rows = Rows((29, 8), heads=4, kv=2, window=20)
    packed = torch.randn(2, 37, 8 * 16, device=DEVICE)
    turned = torch.randn(2, 8, 37, 16, device=DEVICE).transpose(1, 2)
    every_other = torch.randn(2, 37, 8, 32, device=DEVICE)[..., ::2]  # channels apart: copied
    upstream = torch.randn(2, 4, 16, 37, device=DEVICE).permute(0, 3, 1, 2)
    for whole in (packed.unflatten(-1, (8, 16)), turned, every_other):
        parts = whole.split((4, 2, 2), 2)
        before = [x.clone() for x in parts]
        results = []
        for backend in ("triton", "reference"):
            leaves = [x.detach().requires_grad_() for x in parts]
            out = rows.ours(backend)(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, upstream)])
        for mine, expected in zip(*results, strict=True):
            assert relative_error(mine, expected) < 2e-6
        assert all(torch.equal(x, kept) for x, kept in zip(parts, before, strict=True))


@both
@pytest.mark.parametrize("case", ["plain", "80 channels", "window of 7", "left padding", "documents"])
def test_every_element_is_written_and_padding_is_zero(case: str, backend: str) -> None:
    rows = CASES[case]
    leaves = [x.to(DEVICE).requires_grad_() for x in rows.draw()]
    with poisoned_memory():
        out = rows.ours(backend)(*leaves)
        grads = torch.autograd.grad(out, leaves, torch.randn(out.shape, device=DEVICE))
    for result in (out, *grads):
        assert bool(result.isfinite().all())
        assert not bool(result[1:, : rows.padding].any())


@both
def test_a_document_that_changes_leaves_the_others_bit_for_bit(backend: str) -> None:
    rows = Rows((13, 22, 1, 30), kv=2, window=17, softcap=3.0)
    upstream = torch.randn(2, rows.tokens, rows.heads, rows.dim, device=DEVICE)
    inputs = [x.to(DEVICE) for x in rows.draw()]
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, 13:35] = torch.randn_like(x[:, 13:35]) * 5
    results = []
    for values in (inputs, changed):
        leaves = [x.requires_grad_() for x in values]
        out = rows.ours(backend)(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[:, :13], after[:, :13]) and torch.equal(before[:, 35:], after[:, 35:])
        assert not torch.equal(before[:, 13:35], after[:, 13:35])


@both
def test_packed_documents_are_what_they_are_alone(backend: str) -> None:
    rows = Rows((13, 1, 22, 30), kv=2, window=17)
    leaves = [x.to(DEVICE).requires_grad_() for x in rows.draw()]
    upstream = torch.randn(2, rows.tokens, rows.heads, rows.dim, device=DEVICE)
    out = rows.ours(backend)(*leaves)
    together = [out, *torch.autograd.grad(out, leaves, upstream)]
    start = 0
    for length in rows.documents:
        part = slice(start, start + length)
        single = [x.detach()[:, part].requires_grad_() for x in leaves]
        out = Rows((length,), kv=2, window=17).ours(backend)(*single)
        alone = [out, *torch.autograd.grad(out, single, upstream[:, part])]
        for mine, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(mine[:, part], expected, atol=2e-5, rtol=2e-5)
        start += length


def test_equal_inputs_give_equal_bits() -> None:
    rows = CASES["documents, window, softcap"]
    leaves = [x.to(DEVICE).requires_grad_() for x in rows.draw()]
    twice = []
    for _ in range(2):
        out = rows.ours("triton")(*leaves)
        twice.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(one, other) for one, other in zip(*twice, strict=True))


@both
def test_padding_between_tokens_is_seen_by_nobody(backend: Any) -> None:
    mask = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0, 0]], device=DEVICE)
    spans = row_spans((2, 7, torch.device(DEVICE)), mask)
    visible = visible_keys(7, None, spans, torch.device(DEVICE))
    assert torch.equal(visible, torch.ones_like(visible).tril() & mask[:, None].bool())
    q, k, v = (torch.randn(2, 7, n, 16, device=DEVICE) for n in (4, 2, 2))
    out = attention(q, k, v, 0.3, None, None, spans, backend)
    v[~mask.bool()] = 1e6
    k[~mask.bool()] = 1e3
    assert torch.equal(attention(q, k, v, 0.3, None, None, spans, backend), out)


@pytest.mark.grid(1)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("holes", [(), (40,), (0, 63, 64)])
def test_padding_in_rows_of_many_tiles(holes: tuple[int, ...], window: int | None) -> None:
    """Right padding, holes, documents: tiles without a mask must hold none of them."""
    rows = Rows((150,), heads=2, kv=1, window=window)
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[1, 130:] = 0
    mask[1, list(holes)] = 0
    positions = torch.arange(150).expand(2, -1).clone()
    positions[1, 20:] -= 20
    spans = row_spans((2, 150, torch.device(DEVICE)), mask, positions)
    results = []
    inputs = [x.to(DEVICE) for x in rows.draw()]
    upstream = torch.randn(2, 150, 2, 16, device=DEVICE)
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        if backend == "triton":
            out = flash(*leaves, 0.3, window, None, spans, SMALL)
        else:
            out = attention(*leaves, 0.3, window, None, spans, "reference")
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for mine, expected in zip(*results, strict=True):
        assert relative_error(mine, expected) < 3e-6


def test_the_choice_of_backend() -> None:
    assert attention_backend(64, None, None, spans=False) == "sdpa"
    assert attention_backend(64, 64, None, spans=False) == "sdpa"
    assert attention_backend(64, 63, None, spans=False) == "triton"
    assert attention_backend(64, None, 50.0, spans=False) == "triton"
    assert attention_backend(64, None, None, spans=True) == "triton"
    assert attention_backend(65, None, None, spans=False) == "triton"  # no plan of cuDNN's for every length
    assert attention_backend(65, None, None, False, torch.float32) == "sdpa"
    rows = Rows((21,), kv=2, window=30)
    assert_as_good_as_torch(rows.ours("sdpa"), rows.formula(), rows.draw(), torch.float32)
    q, k, v = (x.to(DEVICE) for x in rows.draw())
    for arguments in ((0.3, 7), (0.3, None, 2.0), (0.3, None, None, torch.zeros(2, 21, 3, dtype=torch.int32))):
        with pytest.raises(ValueError, match="use 'triton'"):
            attention(q, k, v, *arguments, backend="sdpa")


@both
def test_what_is_refused_and_what_is_empty(backend: Any) -> None:
    q, k = torch.randn(1, 5, 4, 16, device=DEVICE), torch.randn(1, 5, 2, 16, device=DEVICE)
    for bad in ((q, k[:, :4], k[:, :4]), (q, k, k[:, :, :1]), (q[:, :, :3], k, k)):
        with pytest.raises(ValueError, match="attention needs q"):
            attention(*bad, 1.0, backend=backend)
    with pytest.raises(ValueError, match="counts the token itself"):
        attention(q, k, k, 1.0, 0, backend=backend)
    assert attention(q[:0], k[:0], k[:0], 1.0, backend=backend).shape == (0, 5, 4, 16)


def test_what_the_kernels_refuse() -> None:
    q = torch.randn(1, 5, 4, 16, device=DEVICE)
    wide = torch.randn(1, 5, 1, 288, device=DEVICE)
    with pytest.raises(ValueError, match="2 to 256 channels; got 288"):
        attention(wide, wide, wide, 1.0, backend="triton")
    with pytest.raises(ValueError, match="must share"):
        attention(q, q.half(), q, 1.0, backend="triton")
    with pytest.raises(ValueError, match="spans are"):
        attention(q, q, q, 1.0, None, None, torch.zeros(1, 5, 3, device=DEVICE), backend="triton")


def test_gradcheck_of_the_reference() -> None:
    rows = Rows((3, 2), heads=2, kv=1, dim=3, window=2, softcap=2.0, batch=1)
    leaves = [x.double().requires_grad_() for x in rows.draw()]
    spans = row_spans((1, 5, torch.device("cpu")), None, torch.tensor([[0, 1, 2, 0, 1]]))
    function = lambda q, k, v: attention(q, k, v, 0.7, 2, 2.0, spans, "reference")  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_no_length_compiles_anything_anew() -> None:
    from hasten.ops.attention.kernels import backward
    from hasten.ops.attention.kernels.forward import _attention_fwd

    kernels = (_attention_fwd, backward._attention_dkdv, backward._attention_dq, backward._delta)

    def run(tokens: int, window: int) -> list[int]:
        rows = Rows((tokens - 3, 3), kv=2, dim=64, window=window, batch=1)
        leaves = [x.to(DEVICE, torch.bfloat16).requires_grad_() for x in rows.draw()]
        rows.ours("triton", None)(*leaves).sum().backward()
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    compiled = run(64, 16)
    for tokens, window in ((65, 16), (4, 1), (1000, 999), (1024, 17)):
        assert run(tokens, window) == compiled


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_beyond_two_to_the_31_elements() -> None:
    tokens, heads, dim, window, tail = 2**19 + 5, 32, 128, 40, 300
    q = torch.randn(1, tokens, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    assert q.numel() > 2**31
    k, v = (torch.randn(1, tokens, 1, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    d = torch.randn_like(q)
    results = []
    for backend, part in (("triton", slice(0, None)), ("reference", slice(tokens - tail, None))):
        leaves = [x[:, part].detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, dim**-0.5, window, backend=backend)  # pyright: ignore[reportArgumentType]
        grads = torch.autograd.grad(out, leaves, d[:, part])
        results.append([x[:, window - tail :].float() for x in (out, *grads)])
    for mine, expected in zip(*results, strict=True):
        assert relative_error(mine, expected) < 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_the_current_one() -> None:
    rows = CASES["window of 7"]
    q, k, v = (x.to("cuda:1").requires_grad_() for x in rows.draw())
    out = attention(q, k, v, 0.3, 7, backend="triton")
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    expected = attention(q, k, v, 0.3, 7, backend="reference")
    assert relative_error(out, expected) < 2e-6
    for mine, theirs in zip(grads, torch.autograd.grad(expected.sum(), (q, k, v)), strict=True):
        assert relative_error(mine, theirs) < 2e-5
