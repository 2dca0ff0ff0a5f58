"""A model on several devices: caches and counters per device, and steps in parts.

On a CPU the parts are lists of operations in place of CUDA graphs, and devices are names. Where there are two GPUs, both are real.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from decode_kit import both, engine_note, prompts, served
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from hasten import FastLanguageModel
from hasten.inference.decode import engine, split, steps
from hasten.inference.decode.cache import KVCache, shape_for
from hasten.inference.decode.servable import unserved
from hasten.inference.decode.split import SplitStep
from hasten.inference.decode.step import DecodeStep
from hasten.overlays.cache_name import CACHE
from hasten.overlays.context import AttentionContext
from hasten.state import GenerateCall
from hasten.testing import save_tiny

FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 1)
MODULES = split.devices_of


def halves(model: Any, head: torch.device = SECOND) -> dict[Any, torch.device]:
    """The second half of the layers and the norm on the second device."""
    found = dict.fromkeys(MODULES(model), FIRST)
    return found | dict.fromkeys((*model.model.layers[2:], model.model.norm), SECOND) | {model.lm_head: head}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "cohere2"])
def test_caches_on_two_devices(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt, ragged batch, continuation: each device counts for itself."""

    def shape(*args: Any) -> Any:
        return replace(shape_for(*args), devices=(FIRST, FIRST, SECOND, SECOND))

    stock, ours = served(family)
    monkeypatch.setattr(steps, "shape_for", shape)
    wanted, found = both(stock, ours, **prompts(), max_new_tokens=6, return_dict_in_generate=True, eos_token_id=None)
    assert torch.equal(found.sequences, wanted.sequences)
    ((cache, step),) = ours.__dict__["_hasten_state"].engine._steps._kept.values()
    assert type(step) is SplitStep and len(cache.counters) == 2 and torch.equal(*cache.counters)
    assert cache.view(1).slots_B is cache.counters[0] and cache.view(2).slots_B is cache.counters[1]
    mask = torch.cat((prompts()["attention_mask"], torch.ones(3, 6, dtype=torch.long)), 1)
    results = [
        model.generate(one.sequences, attention_mask=mask, **{CACHE: one[CACHE]}, max_new_tokens=5, do_sample=False)
        for model, one in ((stock, wanted), (ours, found))
    ]
    assert torch.equal(*results) and engine_note(ours) == "engine: hasten"


class Operations(TorchDispatchMode):
    """Operations in place of a CUDA graph: a replay computes them again, into the tensors of the recording."""

    def __init__(self, device: torch.device, places: dict[int, torch.device], kept: list[Any]) -> None:
        super().__init__()
        self._device, self._places, self._kept = device, places, kept
        self._log: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            assert self._places.get(id(x), self._device) == self._device, f"{func} reads a tensor of another device"
        out = func(*args, **(kwargs or {}))
        self._log.append((func, args, kwargs or {}, out))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._places[id(x)] = self._device
                self._kept.append(x)
        return out

    def begin(self) -> None:
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)

    def replay(self) -> None:
        for func, args, kwargs, out in self._log:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Names:
    """Devices by name: a tensor is where it was computed."""

    def __init__(self) -> None:
        self._places: dict[int, torch.device] = {}
        self._kept: list[Any] = []

    def device_of(self, x: torch.Tensor) -> torch.device:
        return self._places.get(id(x), FIRST)

    def empty_like(self, x: torch.Tensor, device: torch.device) -> torch.Tensor:
        made = torch.full_like(x, 77)
        self._places[id(made)] = device
        self._kept.append(made)
        return made

    def graph(self, device: torch.device) -> Operations:
        return Operations(device, self._places, self._kept)


@dataclass(frozen=True, eq=False)
class Mixing(AttentionContext):
    """Stands for attention, whose reference reads numbers on the host: any function of queries, keys and values."""

    def attend(self, module: Any, qkv: Any, attention_mask: Any, past_key_values: Any, kwargs: Any) -> Any:
        q, k, v = qkv
        return q * 0.3 + (k.tanh() + v).repeat_interleave(q.shape[2] // k.shape[2], 2), None

    def to(self, device: Any, non_blocking: bool = False) -> Self:
        return self


@pytest.mark.parametrize("head", [FIRST, SECOND], ids=["head first", "head second"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen3", "cohere", "granite"])
@torch.no_grad()
def test_parts_replay_what_the_forward_computes(
    family: str, head: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = served(family)
    monkeypatch.setattr(split, "devices_of", lambda model: halves(model, head))
    monkeypatch.setattr(SplitStep, "backend", Names())
    cache, other = (KVCache(shape_for(model, 2)) for _ in range(2))
    whole, parts = DecodeStep(model, cache), SplitStep(model, other)
    for step in (whole, parts):
        step._context = Mixing()  # pyright: ignore
        step.token_B1.copy_(torch.tensor([[30], [200]]))
        step.position_B1.copy_(torch.tensor([[4], [9]]))
    parts._capture()
    assert parts.token_B1.tolist() == [[30], [200]] and other.slots_B.tolist() == [0, 0]  # as before the capture
    found = [part.device for part in parts._graph._parts]  # pyright: ignore
    assert [one for index, one in enumerate(found) if index == 0 or one != found[index - 1]] == [
        FIRST, SECOND, *([FIRST] if head == FIRST else []),
    ]  # fmt: skip
    assert len(found) <= 4
    seen = set()
    for _ in range(6):
        for step in (whole, parts):
            step.run()
        torch.testing.assert_close(parts.logits_BV, whole.logits_BV, rtol=1e-5, atol=1e-5)
        assert torch.equal(parts.token_B1, whole.token_B1) and torch.equal(parts.position_B1, whole.position_B1)
        seen.add(tuple(whole.token_B1.flatten().tolist()))
    assert other.slots_B.tolist() == cache.slots_B.tolist() == [6, 6] and len(seen) > 1
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_while_recording_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = served("llama")
    monkeypatch.setattr(split, "devices_of", halves)
    monkeypatch.setattr(SplitStep, "backend", Names())
    step = SplitStep(model, KVCache(shape_for(model, 1)))

    class Failing(Mixing):
        def attend(self, module: Any, *args: Any) -> Any:
            if module.layer_idx == 3 and _get_current_dispatch_mode() is not None:
                raise RuntimeError("from inside")
            return super().attend(module, *args)

    step._context = Failing()  # pyright: ignore
    with pytest.raises(RuntimeError, match="from inside"), torch.no_grad():
        step._capture()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert _get_current_dispatch_mode() is None


def test_who_serves_a_model_on_several_devices() -> None:
    _, model = served("llama")
    call = GenerateCall(model.generate, (), prompts())
    model.lm_head.to("meta")
    assert unserved(model, call, ("cpu",)) == "the model is on 2 devices"
    assert unserved(model, call, ("cpu",), split=True) == "a part of the model is not on a GPU"
    assert unserved(model, call, ("cpu", "meta"), split=True) is None
    assert not engine.SEVERAL_DEVICES


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "cohere"])
def test_two_gpus(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of the parts are those of transformers' loop over the same model; ragged, sampled, and continued."""
    folder = save_tiny(tmp_path, family, amplify=2.0)
    places = {
        "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0, "model.rotary_emb": 0,
        "model.layers.2": 1, "model.layers.3": 1, "model.norm": 1, "lm_head": 0,
    }  # fmt: skip
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=128, dtype=torch.float32, load_in_4bit=False, device_map=places
    )
    batch = {name: x.cuda(0) for name, x in prompts().items()}
    results: list[list[Any]] = []
    for several in (False, True):
        monkeypatch.setattr(engine, "SEVERAL_DEVICES", several)
        found: list[Any] = []
        for how in ({"do_sample": False}, {"do_sample": True, "top_k": 20}):
            torch.manual_seed(3)
            first = model.generate(**batch, **how, max_new_tokens=9, return_dict_in_generate=True, eos_token_id=None)
            mask = torch.ones_like(first.sequences)
            mask[:, :11] = batch["attention_mask"]
            second = model.generate(
                first.sequences, attention_mask=mask, **{CACHE: first[CACHE]}, max_new_tokens=9, **how
            )
            found += [first.sequences, second]
        assert (engine_note(model) == "engine: hasten") == several
        results.append(found)
    for stock, ours in zip(*results, strict=True):
        assert torch.equal(stock, ours)
