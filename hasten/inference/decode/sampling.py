"""Draws the next token of several sequences at once, each with parameters and a random generator of its own.

Order of the steps as in transformers: repetition penalty, temperature, top-k, top-p. A sequence's draws depend on its
own logits, parameters and seed alone, so they are the same whatever other sequences the batch holds.

Shapes: B sequences, R of them sample, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

COLDEST = 1e-5
"""Temperatures below it are greedy decoding: logits divided by them can overflow."""


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 = greedy decoding, to which top_k, top_p and seed do not apply. top_k: 0 = all tokens. top_p: 1 =
    all.

    repetition_penalty: divides positive logits, multiplies negative ones, of tokens in the prompt or generated before;
    1 = none. seed: of a generator on the model's device; None = a random one."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < COLDEST

    def generator(self, device: torch.device) -> torch.Generator:
        """Returns a new generator, seeded."""
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


class Sampler:
    """Chooses tokens for the sequences that do not decode greedily. Made anew when a sequence enters or leaves the
    batch, since it copies their parameters to the device."""

    def __init__(self, batch: int, rows: Mapping[int, tuple[Sampling, torch.Generator]], device: torch.device) -> None:
        """rows: index in the batch -> parameters and generator; other rows stay greedy."""
        penalties = [1.0] * batch
        for row, (sampling, _) in rows.items():
            penalties[row] = sampling.repetition_penalty
        self.penalises = any(penalty != 1.0 for penalty in penalties)
        self._penalty_B1 = torch.tensor(penalties, device=device)[:, None]
        drawn = [(row, *one) for row, one in rows.items() if not one[0].is_greedy]
        cut = [one for one in drawn if one[1].top_k > 0 or one[1].top_p < 1]
        free = [one for one in drawn if one not in cut]
        self._groups = [_Group.of(group, device) for group in (free, cut) if group]

    def choose(self, logits_BV: torch.Tensor, token_B1: torch.Tensor, seen_BV: torch.Tensor | None = None) -> None:
        """Writes the chosen tokens into `token_B1`, which holds the greedy choice.

        logits_BV: fp32, not changed. seen_BV: bool, tokens that a repetition penalty applies to; needed if `penalises`.
        """
        if self.penalises:
            assert seen_BV is not None
            scaled = torch.where(logits_BV < 0, logits_BV * self._penalty_B1, logits_BV / self._penalty_B1)
            logits_BV = torch.where(seen_BV, scaled, logits_BV)
            token_B1.copy_(logits_BV.argmax(-1, keepdim=True))
        for group in self._groups:
            token_B1.index_copy_(0, group.rows_R, group.draw(logits_BV))


@dataclass(frozen=True)
class _Group:
    """Sequences that are drawn together. cut: whether a top-k or top-p applies to any, for which logits are sorted."""

    rows_R: torch.Tensor
    generators: tuple[torch.Generator, ...]
    temperature_R1: torch.Tensor
    top_k_R1: torch.Tensor
    top_p_R1: torch.Tensor
    cut: bool

    @classmethod
    def of(cls, drawn: Sequence[tuple[int, Sampling, torch.Generator]], device: torch.device) -> "_Group":
        rows, samplings, generators = zip(*drawn, strict=True)
        all_tokens = torch.iinfo(torch.int64).max
        return cls(
            torch.tensor(rows, device=device),
            generators,
            torch.tensor([s.temperature for s in samplings], device=device)[:, None],
            torch.tensor([s.top_k or all_tokens for s in samplings], device=device)[:, None],
            torch.tensor([s.top_p for s in samplings], device=device)[:, None],
            any(s.top_k > 0 or s.top_p < 1 for s in samplings),
        )

    def draw(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Returns (R, 1) tokens."""
        scores = logits_BV.index_select(0, self.rows_R) / self.temperature_R1
        if not self.cut:
            return self._index(scores.softmax(-1))
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(scores.shape[-1], device=scores.device)
        share = scores.masked_fill(rank >= self.top_k_R1, float("-inf")).softmax(-1)
        above = share.cumsum(-1) - share  # probability of all tokens that are more likely; 0 for the first
        share = share.masked_fill((above >= self.top_p_R1) & (rank > 0), 0.0)
        return order.gather(-1, self._index(share))

    def _index(self, share_RV: torch.Tensor) -> torch.Tensor:
        """Draws indices (R, 1) in proportion to `share_RV` as `torch.multinomial` does: the first of exponential clocks
        to ring."""
        clock = torch.empty_like(share_RV)
        for row, generator in zip(clock, self.generators, strict=True):
            row.exponential_(generator=generator)
        return (share_RV / clock).argmax(-1, keepdim=True)
