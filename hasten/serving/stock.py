"""Runs requests one at a time through the model's own `generate`, where continuous batching does not apply."""

import secrets
import sys
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from hasten.inference.decode.request import Request
from hasten.state import causal_lm_of


class StockRunner:
    """The interface of `DecodeBatch` with a single row, which is free between two calls: `admit` returns when the
    request has ended."""

    def __init__(self, model: Any) -> None:
        """model: a causal LM or a PeftModel, loaded by hasten."""
        self._model = model
        causal_lm = causal_lm_of(model)
        limit = getattr(getattr(causal_lm, "overlay_config", None), "max_seq_length", None)
        positions = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
        self.capacity = int(limit or positions or sys.maxsize)
        self.free, self.busy = 1, False

    def admit(self, request: Request) -> None:
        """Generates; the request receives each token as it comes. Raises what `generate` raises."""
        sampling, device = request.sampling, self._model.device
        draws = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        asked = {"do_sample": False} if sampling.is_greedy else {"do_sample": True, **draws}
        ids = torch.tensor([request.prompt], device=device)
        eos = sorted(request.limits.eos)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.limits.max_tokens,
                repetition_penalty=sampling.repetition_penalty,
                stopping_criteria=StoppingCriteriaList([_Listener(request)]),
                eos_token_id=eos or None,
                pad_token_id=eos[0] if eos else 0,
                **asked,
            )
        if request.finish is None:
            raise RuntimeError(f"generate ended after {len(request.tokens)} tokens, at no limit of the request")

    def advance(self) -> None:
        """Nothing: `admit` has done it."""

    def clear(self) -> None:
        """Nothing is kept between two requests."""


class _Listener(StoppingCriteria):
    """Hands each new token to the request, and stops where it ends."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        request = self._request
        if request.finish is None and request.cancelled:
            request.drop()
        elif request.finish is None:
            request.take(int(input_ids[0, -1]))
        return torch.tensor([request.finish is not None], device=input_ids.device)
