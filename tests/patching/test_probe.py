"""What the proof for types without a data file takes, and everything near it that must stay stock."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.smollm3.modeling_smollm3 import SmolLM3ForCausalLM
from transformers.utils.generic import can_return_tuple

from hasten.ops import NormConfig
from hasten.overlays import HeadConfig, HeadOverlay, MLPConfig
from hasten.overlays.cache_name import CACHE
from hasten.patching import plan, probe
from hasten.testing import tiny_model
from hasten.testing.quantize import quantize_linears

WIDTH = 24


class Rms(nn.Module):
    """Llama's RMSNorm. The classes below change one thing each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.eps = 1e-5

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * self._normed(hidden_states).to(hidden_states.dtype)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.float32)
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)


class GemmaRms(Rms):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return (self._normed(hidden_states) * (1.0 + self.weight.float())).type_as(hidden_states)


class Fp32Rms(Rms):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return (self.weight.to(torch.float32) * self._normed(hidden_states)).to(hidden_states.dtype)


class Layer(Rms):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.to(torch.float32)
        wide = wide - wide.mean(-1, keepdim=True)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight.to(torch.float32) * normed).to(hidden_states.dtype)


class GatedRms(Rms):
    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self.weight * self._normed(hidden_states * gate)


class OptionallyGatedRms(Rms):
    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        normed = self.weight * self._normed(hidden_states).to(hidden_states.dtype)
        return normed if gate is None else normed * gate


class KeywordRms(Rms):
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return self.weight * self._normed(hidden_states).to(hidden_states.dtype) * kwargs.get("scale", 1.0)


class ScaledRms(Rms):
    """Its factor is 1 until somebody changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * self._normed(hidden_states).to(hidden_states.dtype) * self.factor


class LiteralRms(Rms):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * self._normed(hidden_states).to(hidden_states.dtype) * 1.001


class ClampedRms(Rms):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * self._normed(hidden_states.clamp(-60000.0, 60000.0)).to(hidden_states.dtype)


class TrainingRms(Rms):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = self.weight * self._normed(hidden_states).to(hidden_states.dtype)
        return normed * 2 if self.training else normed


class DetachedRms(Rms):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight.detach() * self._normed(hidden_states).to(hidden_states.dtype)


class NarrowRms(Rms):
    """Normalises in the input's dtype: fp32 alone does not show it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.eps))


class SequenceRms(Rms):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean((-2, -1), keepdim=True) + self.eps)
        return self.weight * normed.to(hidden_states.dtype)


class BufferedRms(Rms):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(WIDTH))


class BiasedRms(Rms):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))


class DelegatingRms(Rms):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states)


class RaisingRms(Rms):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.mean(hidden_states, self.weight)  # pyright: ignore


class CallingRms(Rms):
    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().__call__(hidden_states) * 2


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (Rms, NormConfig(1e-5, "rms", False, False)),
        (Fp32Rms, NormConfig(1e-5, "rms", False, True)),
        (GemmaRms, NormConfig(1e-5, "rms", True, True)),
        (Layer, NormConfig(1e-5, "layer", False, True)),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_taken_wherever_and_in_whatever_dtype_they_are(
    kind: type[Rms], rule: NormConfig, device: str, dtype: torch.dtype
) -> None:
    proof = probe.prove("norm", kind().to(device, dtype))
    assert not isinstance(proof, str), proof
    assert proof[1] == rule


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (GatedRms, "takes hidden_states, gate"),
        (OptionallyGatedRms, "takes hidden_states, gate"),
        (KeywordRms, "takes hidden_states, kwargs"),
        (ScaledRms, "reads factor"),
        (LiteralRms, "match no norm"),
        (ClampedRms, "uses clamp"),
        (TrainingRms, "reads training"),
        (DetachedRms, "uses detach"),
        (NarrowRms, "match no norm"),
        (SequenceRms, "match no norm"),
        (BufferedRms, "a weight alone"),
        (BiasedRms, "a weight alone"),
        (DelegatingRms, "super"),
        (RaisingRms, "raised TypeError in a trial"),
        (CallingRms, "its own __call__"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_that_do_one_thing_more_stay_stock(kind: type[Rms], reason: str, dtype: torch.dtype) -> None:
    proof = probe.prove("norm", kind().to(dtype))
    assert isinstance(proof, str) and reason in proof, proof


class Mlp(nn.Module):
    def __init__(self, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, 32, bias=bias)
        self.up_proj = nn.Linear(WIDTH, 32, bias=bias)
        self.down_proj = nn.Linear(32, WIDTH, bias=bias)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class FunctionMlp(Mlp):
    def __init__(self) -> None:
        super().__init__()
        del self.act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x) * F.silu(self.gate_proj(x)))


class SwappedMlp(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class LimitedMlp(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.swiglu_limit = 1e5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x).clamp(max=self.swiglu_limit)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


class HalvedMlp(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 0.5


class HalvedInputMlp(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x * 0.5)) * self.up_proj(x))


class ResidualMlp(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DropoutMlp(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class FunctionalDropoutMlp(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), 0.1, self.training)


class WideMlp(Mlp):
    """Casts to fp32 around the activation, which an fp32 model does not show."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(self.act_fn(gate.float()).to(gate.dtype) * self.up_proj(x))


class UnusedChildMlp(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)


class ClippingActivation(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x).clamp(max=50000.0)


class RandomActivation(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rrelu(x, training=self.training)


def with_activation(activation: nn.Module) -> Mlp:
    mlp = Mlp()
    mlp.act_fn = activation
    return mlp


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlps_are_taken_with_their_activation(activation: str, bias: bool) -> None:
    x = torch.randn(5, WIDTH)
    for dtype in (torch.float32, torch.bfloat16):
        mlp = Mlp(activation, bias).to(dtype)
        proof = probe.prove("mlp", mlp)
        assert not isinstance(proof, str), proof
        from hasten.ops import glu

        ours = mlp.down_proj(glu(mlp.gate_proj(x.to(dtype)), mlp.up_proj(x.to(dtype)), proof[1].activation))
        assert torch.equal(ours, mlp(x.to(dtype)))


def test_a_gated_mlp_that_calls_a_function_is_taken() -> None:
    assert probe.prove("mlp", FunctionMlp())[1] == MLPConfig("silu")


@pytest.mark.parametrize(
    ("mlp", "reason"),
    [
        (Mlp("quick_gelu"), "is none that hasten has"),
        (Mlp("gelu_10"), "is none that hasten has"),
        (Mlp("relu2"), "is none that hasten has"),
        (Mlp("mish"), "is none that hasten has"),
        (Mlp("leaky_relu"), "is none that hasten has"),
        (SwappedMlp(), "is none that hasten has"),
        (with_activation(ClippingActivation()), "is none that hasten has"),
        (with_activation(RandomActivation()), "is none that hasten has"),
        (with_activation(nn.PReLU()), "reads act_fn"),
        (with_activation(nn.Dropout(0.5)), "is none that hasten has"),
        (LimitedMlp(), "reads act_fn, swiglu_limit"),
        (HalvedMlp(), "not down_proj's output itself"),
        (HalvedInputMlp(), "do not get its input itself"),
        (ResidualMlp(), "not down_proj's output itself"),
        (DropoutMlp(), "reads act_fn, dropout"),
        (FunctionalDropoutMlp(), "reads act_fn, training"),
        (WideMlp(), "uses dtype, float, to"),
        (UnusedChildMlp(), "it has norm beside"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_mlps_that_do_one_thing_more_stay_stock(mlp: Mlp, reason: str) -> None:
    proof = probe.prove("mlp", mlp)
    assert isinstance(proof, str) and reason in proof, proof


def test_one_proof_does_not_hold_for_a_module_with_another_attribute() -> None:
    one, other = Mlp("silu"), Mlp("quick_gelu")
    assert probe.signature(one) != probe.signature(other)
    one, other = Rms(), Rms()
    assert probe.signature(one) == probe.signature(other)
    other.eps = 1e-6
    assert probe.signature(one) != probe.signature(other)
    other = Rms()
    other.forward = lambda hidden_states: hidden_states  # type: ignore[method-assign]
    assert probe.signature(one) != probe.signature(other)
    assert "replaced on the instance" in str(probe.prove("norm", other))


def _with_cache_name(function):
    """The function with `cache`, wherever it names an argument, a field or a key, under the name of the installed
    transformers."""

    def renamed(value):
        if isinstance(value, tuple):
            return tuple(renamed(one) for one in value)
        return CACHE if isinstance(value, str) and value == "cache" else value

    code, parts = function.__code__, ("co_varnames", "co_names", "co_consts")
    function.__code__ = code.replace(**{part: renamed(getattr(code, part)) for part in parts})
    return function


class Causal(SmolLM3ForCausalLM):
    """A causal LM's usual forward; the classes below change one thing each."""

    @can_return_tuple
    @_with_cache_name
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        inputs = self._inputs(input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache)
        outputs = self.model(**inputs, **kwargs)
        hidden_states = self._hidden(outputs.last_hidden_state)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._logits(self.lm_head(hidden_states[:, kept, :]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=self._final(loss, outputs),
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @_with_cache_name
    def _inputs(self, ids, mask, positions, past, embeds, use_cache):
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "cache": past,
            "inputs_embeds": embeds,
            "use_cache": use_cache,
        }

    def _hidden(self, hidden):
        return hidden

    def _logits(self, logits):
        return logits

    def _final(self, loss, outputs):
        return loss


class FloatCausal(Causal):
    def _logits(self, logits):
        return logits.float()


class DoubledCausal(Causal):
    def _logits(self, logits):
        return logits * 2.0


class SoftcapCausal(Causal):
    def _logits(self, logits):
        return torch.tanh(logits / 1e6) * 1e6


class ConfigCausal(Causal):
    """Scales only where the config has a field that it lacks today."""

    def _logits(self, logits):
        return logits * self.config.final_scale if getattr(self.config, "final_scale", None) else logits


class DropoutCausal(Causal):
    def _hidden(self, hidden):
        return F.dropout(hidden, 0.1, self.training)


class HalvedHiddenCausal(Causal):
    def _hidden(self, hidden):
        return hidden / 2


class RouterCausal(Causal):
    def _final(self, loss, outputs):
        return loss + outputs.router_loss if loss is not None and "router_loss" in outputs else loss


class NegatedLossCausal(Causal):
    def _final(self, loss, outputs):
        return None if loss is None else -loss


class UndecoratedCausal(Causal):
    """Returns no tuple where `return_dict=False` asks for one."""

    forward = Causal.forward.__wrapped__  # pyright: ignore


class NoMaskCausal(Causal):
    @_with_cache_name
    def _inputs(self, ids, mask, positions, past, embeds, use_cache):
        return {"input_ids": ids, "position_ids": positions, "cache": past, "inputs_embeds": embeds}


CAUSAL = {
    FloatCausal: "uses float",
    DoubledCausal: "outputs are not those",
    SoftcapCausal: "uses tanh, torch",
    ConfigCausal: "uses final_scale, getattr",
    DropoutCausal: "reads training",
    HalvedHiddenCausal: "inputs of its lm_head are not those",
    RouterCausal: "uses router_loss",
    NegatedLossCausal: "outputs are not those",
    UndecoratedCausal: "not those of lm_head(last hidden state), given attention_mask",
    NoMaskCausal: "arguments of its backbone are not those",
}


def causal(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model("smollm3", dtype=dtype, num_hidden_layers=1)
    model.__class__ = kind
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_head_is_taken(dtype: torch.dtype) -> None:
    assert probe.prove("head", causal(Causal, dtype)) == (HeadOverlay, HeadConfig())
    assert probe.prove("head", causal(SmolLM3ForCausalLM, dtype)) == (HeadOverlay, HeadConfig())


@pytest.mark.parametrize("kind", CAUSAL, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_do_one_thing_more_stay_stock(kind: type[nn.Module], dtype: torch.dtype) -> None:
    proof = probe.prove("head", causal(kind, dtype))
    assert isinstance(proof, str) and CAUSAL[kind] in proof, proof


class OddHead(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3


def test_a_head_of_another_class_or_a_further_child_stays_stock() -> None:
    model = causal(SmolLM3ForCausalLM)
    model.lm_head.__class__ = OddHead
    assert "its head is a OddHead" in probe.prove("head", model)
    model = causal(SmolLM3ForCausalLM)
    model.value_head = nn.Linear(64, 1)
    assert "value_head" in probe.prove("head", model)


def test_the_proof_leaves_model_and_random_state_alone() -> None:
    model = tiny_model("smollm3").train()
    model.model.layers[0].mlp.act_fn.eval()
    before = {name: (id(t), t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.random.get_rng_state()
    planned = plan(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(planned.actions) == 4 * 3 + 2
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert (id(tensor), tensor._version) == before[name][:2] and torch.equal(tensor, before[name][2])
        assert tensor.grad is None


def test_the_plan_is_the_same_on_meta_quantised_with_adapters_and_under_autocast() -> None:
    from peft import LoraConfig, get_peft_model

    dense = tiny_model("smollm3")
    expected = [(a.name, a.overlay, a.overlay_config) for a in plan(dense).actions]
    adapted = get_peft_model(copy.deepcopy(dense), LoraConfig(r=2, target_modules="all-linear"))
    for other in (copy.deepcopy(dense).to("meta"), copy.deepcopy(dense).half(), adapted):
        assert [(a.name, a.overlay, a.overlay_config) for a in plan(other).actions] == expected
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert [(a.name, a.overlay, a.overlay_config) for a in plan(dense).actions] == expected
    pytest.importorskip("bitsandbytes")
    quantized = quantize_linears(copy.deepcopy(dense))
    assert [(a.name, a.overlay, a.overlay_config) for a in plan(quantized).actions] == expected
