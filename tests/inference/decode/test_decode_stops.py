"""A look that comes late changes nothing of a call: not its tokens, scores, cache, stream or random numbers."""

from typing import Any

import pytest
import torch
from decode_kit import engine_note, prompts, served
from device_kit import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, StoppingCriteria, TopKLogitsWarper
from transformers.generation import EosTokenCriteria, PrefixConstrainedLogitsProcessor
from transformers.generation.streamers import BaseStreamer

from hasten.inference.decode import DecodeEngine
from hasten.inference.decode.stops import LAG, StopWatch, lag_for
from hasten.overlays.cache_name import CACHE
from hasten.state import state_of
from hasten.testing.tiny import VOCABULARY


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.given: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.tolist())

    def end(self) -> None:
        self.given.append("end")


@pytest.mark.parametrize("lag", [1, 2, 7])
@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": True, "top_k": 5}], ids=str)
def test_late_looks_change_nothing(lag: int, how: dict[str, Any]) -> None:
    stock, ours = served("llama")
    state_of(ours).engine = DecodeEngine(("cpu", "cuda"), lag=lag)
    asked = {
        **prompts(),
        "max_new_tokens": 9,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    ends = set()
    for eos in (None, *(list(range(first, 288, 3)) for first in range(3)), list(range(0, 288, 2)), list(range(288))):
        heard, states = [Recorder(), Recorder()], []
        results = []
        for model, streamer in zip((stock, ours), heard, strict=True):
            torch.manual_seed(4)
            results.append(model.generate(**asked, **how, eos_token_id=eos, streamer=streamer))
            states.append(torch.get_rng_state())
        wanted, found = results
        assert torch.equal(found.sequences, wanted.sequences) and len(found.scores) == len(wanted.scores)
        assert found[CACHE].get_seq_length() == wanted[CACHE].get_seq_length()
        assert heard[0].given == heard[1].given
        assert torch.equal(*states)
        ends.add(found.sequences.shape[1])
    assert len(ends) > 2  # some calls stop early, at different lengths


def test_streams_while_later_steps_run() -> None:
    heard = Recorder()
    watch = StopWatch(torch.device("cpu"), heard, lag=2, draws=False)
    for length in range(5):
        assert not watch.add(torch.tensor([True]), torch.tensor([length]), length)
        assert len(heard.given) == max(0, length - 1)
    assert watch.finish() == 4 and heard.given == [[0], [1], [2], [3], [4]]
    assert StopWatch(torch.device("cpu"), None, lag=2, draws=False).finish() is None


def test_who_may_see_a_step_too_many() -> None:
    class Processor(LogitsProcessor):
        pass

    class Criterion(StoppingCriteria):
        pass

    gpu, own = torch.device("cuda", 0), [TopKLogitsWarper(3), EosTokenCriteria(torch.tensor([2]))]
    assert lag_for(gpu, own) == LAG and lag_for(torch.device("cpu"), own) == 0
    for one in (Processor(), Criterion(), PrefixConstrainedLogitsProcessor(lambda *_: [1], 1)):
        assert lag_for(gpu, [*own, one]) == 0


@pytest.mark.skipif(DEVICE == "cuda", reason="a captured step cannot run under a dispatch mode")
def test_without_a_criterion_nothing_is_looked_at() -> None:
    """The host reads no number of a tensor per token."""
    _, ours = served("llama")
    reads = []
    for eos, count in ((None, 3), (None, 7), (VOCABULARY - 1, 3), (VOCABULARY - 1, 7)):
        with Reads() as seen:
            ids = ours.generate(**prompts(), max_new_tokens=count, do_sample=False, eos_token_id=eos, pad_token_id=0)
        assert ids.shape[1] == 11 + count and engine_note(ours) == "engine: hasten"
        reads.append(seen.count)
    assert reads[1] == reads[0] and reads[3] >= reads[2] + 4


class Reads(TorchDispatchMode):
    """How often the host reads a number of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))
