"""A training output behaves as transformers' ModelOutput, except that reading its logits raises with the reason."""

import copy
import dataclasses
import io
import operator
import pickle
from collections.abc import Callable
from typing import Any

import accelerate.utils
import pytest
import torch
import torch.utils._pytree as pytree
from accelerate.utils.operations import convert_to_fp32
from torch.distributed.utils import _apply_to_tensors
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from hasten.errors import InputError
from hasten.overlays.cache_name import CACHE
from hasten.overlays.fused_output import MISSING_LOGITS, FusedLossOutput, FusedLossTuple
from hasten.patching import apply
from hasten.testing import tiny_model

IDS = torch.arange(6, 30).reshape(2, 12)


def _train(**kwargs: Any) -> Any:
    model = tiny_model("llama", num_hidden_layers=1)
    apply(model)
    return model.train()(IDS, labels=IDS, **kwargs)


@pytest.fixture(scope="module")
def output() -> FusedLossOutput:
    return _train(output_hidden_states=True)


READS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda o: o.logits,
    "attrgetter": operator.attrgetter("logits"),
    "key": lambda o: o["logits"],
    "get": lambda o: o.get("logits"),
    "get with a default": lambda o: o.get("logits", 0),
    "index": lambda o: o[1],
    "negative index": lambda o: o[-2],
    "slice, index": lambda o: o[1:][0],
    "tuple": lambda o: o.to_tuple()[1],
    "unpacked, shape": lambda o: (lambda loss, logits, *rest: logits.shape)(*o.to_tuple()),
    "unpacked, softmax": lambda o: torch.softmax((lambda loss, logits, *rest: logits)(*o.to_tuple()), -1),
    "unpacked, sum": lambda o: (lambda loss, logits, *rest: loss + logits)(*o.to_tuple()),
    "unpacked, index": lambda o: (lambda loss, logits, *rest: logits[..., :-1, :])(*o.to_tuple()),
    "unpacked, bool": lambda o: bool(list(o.to_tuple())[1]),
}


@pytest.mark.parametrize("read", READS)
def test_reading_the_logits_raises_with_the_reason(read: str, output: Any) -> None:
    with pytest.raises(InputError, match="never computes them"):
        READS[read](output)


def test_the_tuple_of_return_dict_false_keeps_the_place_of_the_logits() -> None:
    values = _train(return_dict=False, output_hidden_states=True)
    assert isinstance(values, tuple) and len(values) == 3
    assert values[0].shape == () and isinstance(values[2], tuple) and values[:1] == (values[0],)
    loss, logits, hidden = values
    assert loss is values[0] and logits is MISSING_LOGITS and hidden is values[2]
    with pytest.raises(InputError, match="never computes them"):
        values[1]


def test_probing_works(output: Any) -> None:
    assert isinstance(output, CausalLMOutputWithPast) and isinstance(output, ModelOutput)
    assert not hasattr(output, "logits") and getattr(output, "logits", 7) == 7
    assert not hasattr(output, "aux_loss") and getattr(output, "aux_loss", None) is None
    assert "logits" not in output and "loss" in output
    assert output.attentions is None and output["loss"] is output.loss is output[0] is output.get("loss")
    assert output.get("aux_loss", 3) == 3


def test_a_swallowed_lookup_is_logged(output: Any, caplog: pytest.LogCaptureFixture) -> None:
    from hasten.overlays import fused_output

    fused_output._log_lookup.cache_clear()
    assert getattr(output, "logits", None) is None
    assert getattr(output, "logits", None) is None
    assert [record.message.count("never computes them") for record in caplog.records] == [1]


def test_it_is_a_mapping_and_a_dataclass(output: Any) -> None:
    assert list(output) == list(output.keys()) == ["loss", "hidden_states"]
    assert [name for name, _ in output.items()] == ["loss", "hidden_states"] and len(output.values()) == 2
    assert {**output}.keys() == dict(output).keys() == {"loss", "hidden_states"}
    assert "logits=<not computed by the fused loss>" in repr(output) and "loss=tensor" in str(output)
    fields = [field.name for field in dataclasses.fields(output)]
    assert fields == list(vars(output)) == ["loss", CACHE, "hidden_states", "attentions"]
    twin = dataclasses.replace(output, loss=torch.zeros(()))
    assert type(twin) is type(output) and twin.loss == 0 and twin.hidden_states is output.hidden_states
    assert output == output and output != twin
    match output:
        case CausalLMOutputWithPast(loss=found):
            assert found is output.loss


def test_copies(output: Any) -> None:
    detached: Any = FusedLossOutput(
        loss=output.loss.detach(), hidden_states=tuple(h.detach() for h in output.hidden_states)
    )
    buffer = io.BytesIO()
    torch.save(detached, buffer)
    buffer.seek(0)
    copies: tuple[Any, ...] = (
        copy.copy(detached),
        copy.deepcopy(detached),
        pickle.loads(pickle.dumps(detached)),  # noqa: S301
        torch.load(buffer, weights_only=False),
    )
    assert {type(twin) for twin in copies} == {FusedLossOutput}
    for twin in copies:
        assert list(twin) == list(detached) and vars(twin).keys() == vars(detached).keys()
        assert torch.equal(twin.loss, detached.loss) and torch.equal(twin.hidden_states[1], detached.hidden_states[1])
    values = pickle.loads(pickle.dumps(detached.to_tuple()))  # noqa: S301
    assert type(values) is FusedLossTuple and list(values)[1] is MISSING_LOGITS
    assert copy.deepcopy(values).__class__ is FusedLossTuple and copy.deepcopy(MISSING_LOGITS) is MISSING_LOGITS


@pytest.mark.parametrize("form", ["output", "tuple"])
def test_traversals(form: str, output: Any) -> None:
    """Those of pytree, accelerate, and FSDP find every tensor and keep the type."""
    given = output if form == "output" else output.to_tuple()
    count = 1 + len(output.hidden_states)
    assert len(pytree.tree_leaves(given)) == count
    doubled = pytree.tree_map(lambda t: t.detach() * 2, given)
    assert type(doubled) is type(given) and doubled[0] == output.loss * 2
    seen: list[torch.Tensor] = []
    _apply_to_tensors(lambda t: seen.append(t) or t, given)
    assert len(seen) == count
    half = accelerate.utils.recursively_apply(lambda t: t.detach().bfloat16(), given)
    assert type(half) is type(given) and half[0].dtype == torch.bfloat16
    full = convert_to_fp32(half)
    assert type(full) is type(given) and full[0].dtype == torch.float32 and full[2][0].dtype == torch.float32
    assert type(accelerate.utils.send_to_device(half, "cpu")) is type(given)
    for traversed in (doubled, half, full):
        with pytest.raises(InputError, match="never computes them"):
            traversed[1]


def test_convert_outputs_to_fp32_wraps_a_training_forward() -> None:
    model = tiny_model("llama", num_hidden_layers=1).bfloat16()
    apply(model)
    forward = accelerate.utils.convert_outputs_to_fp32(model.train().forward)
    found: Any = forward(IDS, labels=IDS, output_hidden_states=True)
    assert found.hidden_states[0].dtype == torch.float32 and not hasattr(found, "logits")
    found.loss.backward()


def test_gather_of_a_single_process(output: Any) -> None:
    gathered: Any = accelerate.Accelerator(cpu=True).gather(output)
    assert gathered.loss is output.loss


def test_assigned_logits_make_it_a_plain_output(output: Any) -> None:
    twin = copy.copy(output)
    twin.logits = torch.zeros(2, 12, 288)
    assert type(twin) is CausalLMOutputWithPast and list(twin) == ["loss", "logits", "hidden_states"]
    assert twin[1] is twin.logits and twin[0] is output.loss
    by_key = copy.copy(output)
    by_key["logits"] = twin.logits
    assert by_key["logits"] is by_key.logits is twin.logits
