"""Who gets a decode engine, and that engines never share anything: copies, pickles, threads, two models."""

import copy
import functools
import gc
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_kit import engine_note, prompts, served
from peft import LoraConfig, get_peft_model

from hasten import FastLanguageModel
from hasten.inference import engine_of, for_inference
from hasten.inference.decode import DecodeEngine
from hasten.inference.decode.fingerprint import fingerprint
from hasten.inference.engine import StockEngine, decode_engine_for
from hasten.methods import CausalLMMethods
from hasten.options import LoadOptions
from hasten.patching import apply
from hasten.state import state_of
from hasten.testing import save_tiny
from hasten.testing.tiny import tiny_model
from hasten.training import checkpointing, for_training

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def made(family: str = "llama", **changes: Any) -> Any:
    model = tiny_model(family, **{"amplify": 2.0, **changes}).eval()
    apply(model, methods=CausalLMMethods)
    return model


def test_on_a_cpu_nothing_changes() -> None:
    model = made()
    model.generate(**prompts(), **GREEDY)
    assert isinstance(engine_of(model), StockEngine) and state_of(model).engine is None
    assert "generation" not in state_of(model).notes
    assert isinstance(engine_of(tiny_model("llama")), StockEngine)


def test_who_gets_a_decode_engine() -> None:
    """Which devices it serves is what its check accepts."""
    model, fp8 = made(), LoadOptions(float8_kv_cache=True)
    assert decode_engine_for("cpu", in_fp8=False) is None
    on_gpu, on_cpu = decode_engine_for("cuda", in_fp8=False), decode_engine_for("cpu", in_fp8=True)
    assert on_gpu is not None and on_gpu.check(model, fp8)
    assert on_cpu is not None and not on_cpu.check(model, fp8)


def test_a_model_keeps_an_engine_of_its_own() -> None:
    one, other = made(), made()
    for model in (one, other):
        state_of(model).load_options = LoadOptions(float8_kv_cache=True)
    first = one.generate(**prompts(), **GREEDY)
    mine = engine_of(one)
    assert isinstance(mine, DecodeEngine) and mine is engine_of(one) is not engine_of(other)
    assert engine_note(one) == "engine: hasten" and mine.captured == 1
    chosen = StockEngine()
    state_of(one).engine = chosen
    assert engine_of(one) is chosen
    assert one.generate(**prompts(), **GREEDY).shape == first.shape and mine.captured == 1


def test_float8_kv_cache_of_loading(tmp_path: Path) -> None:
    """It takes effect on a CPU too."""
    folder = str(save_tiny(tmp_path, "llama"))
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=64, load_in_4bit=False, float8_kv_cache=True)
    model.generate(**prompts(), **GREEDY)
    assert engine_note(model) == "engine: hasten"
    (cache, _), *_ = engine_of(model)._steps._kept.values()  # pyright: ignore
    assert cache.shape.dtype is torch.float8_e4m3fn and cache.shape.capacity == 64


def test_a_model_of_which_a_part_is_stock_is_transformers() -> None:
    _, model = served("llama")
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: None)
    model.generate(**prompts(), **GREEDY)
    assert engine_note(model).startswith("engine: transformers, since ")


def replaced(model: Any) -> None:
    inner = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda *args: inner(*args) * 1.5


def subclassed(model: Any) -> None:
    class Doubled(type(model.model.norm)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) + 1

    model.model.norm.__class__ = Doubled


def hooked(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: out.flip(-1))


def prepared(model: Any) -> None:
    inner = model.prepare_inputs_for_generation

    @functools.wraps(inner)
    def changed(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return inner(input_ids % 100, **kwargs)

    model.prepare_inputs_for_generation = changed


def compiled(model: Any) -> None:
    model.model.layers[0].mlp.compile(backend="eager")


@pytest.mark.parametrize("change", [replaced, subclassed, hooked, prepared, compiled])
def test_code_of_the_user_inside_the_model_runs_at_each_token(change: Any) -> None:
    stock, ours = served("llama")
    plain = ours.generate(**prompts(), **GREEDY)
    for model in (stock, ours):
        change(model)
    results = [model.generate(**prompts(), **GREEDY) for model in (stock, ours)]
    assert torch.equal(*results) and engine_note(ours).startswith("engine: transformers, since ")
    assert change is compiled or not torch.equal(results[0], plain)


def test_hooks_of_a_trainer_do_not_count() -> None:
    """Activation checkpointing of adapters needs gradients of the embedding's output, by a hook that stays while sampling."""
    stock, ours = served("llama")
    ours.enable_input_require_grads()
    expected = stock.generate(**prompts(), **GREEDY)
    assert torch.equal(ours.generate(**prompts(), **GREEDY), expected) and engine_note(ours) == "engine: hasten"
    ours.model.embed_tokens.register_forward_hook(lambda *_: None)
    ours.generate(**prompts(), **GREEDY)
    assert "model.embed_tokens has forward hooks" in engine_note(ours)


def test_hooks_on_every_module_send_the_call_to_transformers() -> None:
    _, ours = served("llama")
    seen: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(type(m).__name__))
    try:
        ours.generate(**prompts(), **GREEDY)
    finally:
        handle.remove()
    assert engine_note(ours).startswith("engine: transformers") and sum("Head" in s or "LM" in s for s in seen) >= 6


def test_for_inference_and_back() -> None:
    stock, ours = served("llama")
    checkpointing.enable(ours, True)
    for_training(ours)
    expected = stock.generate(**prompts(), **GREEDY)
    assert torch.equal(ours.generate(**prompts(), **GREEDY), expected)
    assert ours.training and ours.is_gradient_checkpointing and not ours.config.use_cache
    for_inference(ours)
    assert torch.equal(ours.generate(**prompts(), **GREEDY), expected)
    assert engine_note(ours) == "engine: hasten"


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301


@pytest.mark.parametrize("way", [copy.deepcopy, pickled])
def test_a_copy_has_an_engine_of_its_own(way: Any) -> None:
    _, ours = served("qwen3")
    state_of(ours).engine = DecodeEngine(("cpu",), cache=torch.int8)
    before = ours.generate(**prompts(), **GREEDY)
    other = way(ours)
    mine, theirs = state_of(ours).engine, state_of(other).engine
    assert isinstance(theirs, DecodeEngine) and theirs is not mine and theirs.captured == 0
    assert torch.equal(other.generate(**prompts(), **GREEDY), before)
    (cache, _), *_ = theirs._steps._kept.values()
    assert cache.shape.dtype is torch.int8
    with torch.no_grad():
        other.lm_head.weight.copy_(other.lm_head.weight.flip(0))
    assert not torch.equal(other.generate(**prompts(), **GREEDY), before)
    assert torch.equal(ours.generate(**prompts(), **GREEDY), before)


def test_a_model_that_generated_is_freed_with_its_last_reference() -> None:
    """Without waiting for the garbage collector, which a notebook would have to call."""
    _, ours = served("llama")
    gc.collect()
    gc.disable()
    try:
        ours.generate(**prompts(), **GREEDY)
        alive, weights = weakref.ref(ours), weakref.ref(ours.lm_head.weight)
        del ours
        assert alive() is None and weights() is None
    finally:
        gc.enable()


def test_threads_and_models_do_not_mix() -> None:
    """Four threads, two models, different prompts; each call gets what it gets alone."""
    models = [served("llama")[1], served("gemma2")[1]]
    cases = [(models[index % 2], prompts(lengths=(3 + index, 9), seed=index)) for index in range(4)]
    expected = [model.generate(**batch, **GREEDY) for model, batch in cases]
    found: list[list[torch.Tensor]] = [[] for _ in cases]
    notes: set[str] = set()
    start = threading.Barrier(len(cases))

    def run(index: int) -> None:
        model, batch = cases[index]
        start.wait()
        for _ in range(6):
            found[index].append(model.generate(**batch, **GREEDY))
            notes.add(engine_note(model))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert notes == {"engine: hasten"}
    for wanted, results in zip(expected, found, strict=True):
        assert len(results) == 6 and all(torch.equal(one, wanted) for one in results)


def adapted() -> tuple[Any, Any]:
    """(stock, ours) with two adapters, "default" and "other"."""
    pair = []
    for model in served("llama"):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        peft = get_peft_model(model, config)
        peft.add_adapter("other", config)
        pair.append(peft.eval())
    return pair[0], pair[1]


def test_adapters_that_change_are_read() -> None:
    """In place as an optimizer does, by name, by scale, off, and merged."""
    stock, ours = adapted()
    results = []

    def same() -> None:
        pair = [peft.generate(**prompts(), **GREEDY) for peft in (stock, ours)]
        assert torch.equal(*pair) and engine_note(ours) == "engine: hasten"
        results.append(tuple(pair[1].flatten().tolist()))

    def update(peft: Any) -> None:
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-3)

    def rescale(peft: Any) -> None:
        for module in peft.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(0.3)

    same()
    for change in (update, lambda peft: peft.set_adapter("other"), rescale, lambda peft: peft.merge_adapter()):
        for peft in (stock, ours):
            change(peft)
        same()
    for peft in (stock, ours):
        peft.unmerge_adapter()
    with stock.disable_adapter(), ours.disable_adapter():
        same()
    same()
    assert len({results[index] for index in (0, 1, 2, 3, 5)}) == 5  # merging changes no token


def test_what_a_graph_has_baked_in() -> None:
    """Each change of these makes another step; values in place, which a graph reads, do not."""
    _, ours = served("llama")
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    peft = get_peft_model(ours, config)
    peft.add_adapter("other", config)
    layer = ours.model.layers[0].self_attn.q_proj
    seen = [fingerprint(ours)]

    def changes(what: str) -> None:
        now = fingerprint(ours)
        assert now not in seen, what
        assert hash(now) == hash(fingerprint(ours))
        seen.append(now)

    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.01)
    ours.train()
    assert fingerprint(ours) == seen[0]
    peft.set_adapter("other")
    changes("the adapter")
    ours.lm_head._active_adapter = ["default"]
    changes("the adapter of a module that is saved whole")
    layer.scale_layer(0.5)
    changes("a scale")
    with peft.disable_adapter():
        changes("no adapter")
    layer.merge()
    changes("a merged layer")
    layer.lora_A["other"].weight.data = layer.lora_A["other"].weight.data.clone()
    changes("the address of a weight")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        changes("autocast")
    ours.forward = functools.partial(ours.forward)
    changes("a forward of its own")
    kind = type(ours.model.norm)
    ours.model.norm.__class__ = type(kind.__name__, (kind,), {})
    changes("a class")
    other = served("llama")[1]
    assert fingerprint(other) != fingerprint(served("llama")[1])


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning:peft.peft_model")
def test_prompt_tuning_is_transformers() -> None:
    """PEFT replaces how the model prepares its inputs."""
    from peft import PromptTuningConfig

    pair = []
    for model in served("llama"):
        torch.manual_seed(1)
        peft = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        pair.append(peft.eval().generate(**prompts(lengths=(5,)), **GREEDY))
    assert torch.equal(*pair) and "its own prepare_inputs_for_generation" in engine_note(model)
