"""`get_peft_model`: what matches nothing, or would be ignored, raises with similar names and leaves the model unchanged;
what is accepted trains exactly what was asked, loads into plain PEFT and is merged right."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from device_kit import DEVICE, GRADIENTS, assert_near
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from hasten import FastLanguageModel
from hasten.errors import OptionError
from hasten.testing import save_tiny, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
"""PEFT warns of what these tests ask for on purpose."""

IDS = torch.randint(6, 260, (2, 16), generator=torch.Generator().manual_seed(1)).to(DEVICE)
Q = ["q_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    small: dict[str, Any] = {"num_hidden_layers": 2}
    found = {name: save_tiny(root / name, name, **small) for name in ("llama", "qwen2")}
    found["tied"] = save_tiny(root / "tied", "llama", tie_word_embeddings=True, **small)
    sizes: dict[str, Any] = {"vocab_size": 288, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    config = AutoConfig.for_model("gpt2", **sizes, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "gpt2")
    tiny_tokenizer().save_pretrained(root / "gpt2")
    found["gpt2"] = root / "gpt2"
    moe: dict[str, Any] = {"num_local_experts": 4, "intermediate_size": 64}
    found["mixtral"] = save_tiny(root / "mixtral", "mixtral", **small, **moe)
    return found


def load(folder: Path, **options: Any) -> Any:
    options = {"load_in_4bit": False, "dtype": torch.float32, "max_seq_length": 64, **options}
    return FastLanguageModel.from_pretrained(str(folder), **options)[0]


def stock(folder: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model.to(DEVICE)


def facts(model: Any) -> list[Any]:
    return [(name, type(module)) for name, module in model.named_modules()] + [
        (name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()
    ]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"target_modules": ["q_proj", "k_prj"]}, r"'k_prj' matches no module .*did you mean k_proj"),
    ("llama", {"target_modules": ["q_proj", "mlp"]}, r"'mlp' is not a Linear layer"),
    ("llama", {"target_modules": "q_proj"}, "matches no module as a regular expression"),
    ("llama", {"target_modules": "q_(proj"}, "is not a regular expression"),
    ("llama", {"target_modules": ".*self_attn"}, "is not a Linear layer"),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, "'v_proj' matches only modules"),
    ("llama", {"exclude_modules": ["vproj"]}, r"exclude_modules 'vproj' excludes none .*did you mean v_proj"),
    ("llama", {"exclude_modules": ".*head"}, r"exclude_modules '\.\*head' excludes none"),
    ("llama", {"rank_pattern": {"q_proj": 8, "qproj": 2}}, r"rank_pattern 'qproj' .*did you mean q_proj"),
    ("llama", {"rank_pattern": {"q_proj": 8, ".*q_proj": 2}}, "matches only what an earlier key matches"),
    ("llama", {"target_modules": Q, "alpha_pattern": {"v_proj": 8}}, "alpha_pattern 'v_proj' matches no module with"),
    ("llama", {"rank_pattern": {"q_proj": "8"}}, "must map module names to ranks"),
    ("llama", {"layers_to_transform": [1, 2]}, r"layers_to_transform 2: .* layers 0 to 1"),
    ("llama", {"layers_to_transform": []}, "must be a layer's index"),
    ("llama", {"layers_to_transform": 0, "target_modules": ".*q_proj"}, "needs target_modules as a list"),
    ("llama", {"layers_to_transform": 0, "layers_pattern": "layer"}, r"layers_pattern 'layer' .*did you mean layers"),
    ("llama", {"layers_pattern": "layers"}, "only with layers_to_transform"),
    ("llama", {"modules_to_save": ["input_norm"]}, r"modules_to_save 'input_norm' .*did you mean input_layernorm"),
    ("llama", {"modules_to_save": ["act_fn"]}, "has no weights to train"),
    ("llama", {"target_modules": Q, "modules_to_save": ["self_attn"]}, "'q_proj' matches only modules that"),
    ("llama", {"target_parameters": ["q_proj.wight"]}, r"target_parameters .*did you mean q_proj.weight"),
    ("llama", {"target_modules": [], "target_parameters": ["norm.weight"]}, "LoRA needs a dense matrix"),
    ("llama", {"trainable_token_indices": [5, 288]}, r"trainable_token_indices \[288\]: .* 0 to 287"),
    ("llama", {"trainable_token_indices": [5, 5]}, "without repetition"),
    ("llama", {"trainable_token_indices": {"embed_token": [5]}}, "did you mean embed_tokens"),
    ("llama", {"trainable_token_indices": [5], "target_modules": ["q_proj", "embed_tokens"]}, "trained fully already"),
    ("llama", {"bias": "all"}, "no layer of this model has a bias"),
    ("qwen2", {"bias": "lora_only", "target_modules": ["o_proj"]}, "no layer with a LoRA has a bias"),
    ("llama", {"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": False}, "fan_in_fan_out=False"),
    ("gpt2", {"target_modules": ["c_atn"]}, "did you mean c_attn"),
    ("llama", {"ensure_weight_tying": True}, "no tied modules were found"),
    ("tied", {"ensure_weight_tying": True}, "no tied modules are added"),
    ("llama", {"init_lora_weights": "pisa"}, "Unknown initialization"),
    ("llama", {"init_lora_weights": "corda"}, "preprocess_corda"),
    ("llama", {"init_lora_weights": "lora_ga"}, "preprocess_loraga"),
    ("llama", {"init_lora_weights": "eva"}, "initialize_lora_eva_weights"),
    ("llama", {"use_qalora": True}, "only on layers that GPTQ has quantised"),
    ("llama", {"lora_bias": True, "use_dora": True}, "not supported for DoRA"),
    ("llama", {"target_modules": Q, "target_parameters": ["q_proj.weight"]}, "not a valid target"),
    ("llama", {"alora_invocation_tokens": [300], "use_gradient_checkpointing": False}, r"\[300\]: .* 0 to 287"),
    ("llama", {"alora_invocation_tokens": [7]}, "needs use_gradient_checkpointing=False"),
    ("llama", {"layer_replication": [[0, 9]]}, "out of range"),
    ("llama", {"use_bdlora": {"target_modules_bd_b": ["zz"], "nblocks": 2}}, "matches neither A nor B"),
    ("mixtral", {"target_modules": ["q_proj", "w1"]}, "without also targeting w3"),
]


@pytest.mark.parametrize(("base", "asked", "said"), REFUSED, ids=[f"{b}-{a}" for b, a, _ in REFUSED])
def test_options_without_an_effect_raise_and_change_nothing(
    bases: dict[str, Path], base: str, asked: dict[str, Any], said: str
) -> None:
    model = load(bases[base])
    before, config = facts(model), model.config.to_dict()
    with pytest.raises(OptionError, match=f"(?s){said}"):
        FastLanguageModel.get_peft_model(model, r=4, **asked)
    assert facts(model) == before and model.config.to_dict() == config and not hasattr(model, "peft_config")
    targets = ["c_attn"] if base == "gpt2" else Q
    assert FastLanguageModel.get_peft_model(model, r=4, target_modules=targets)(IDS).logits.isfinite().all()


def lora_of(*names: str) -> set[str]:
    return {f"{name}.lora_{part}" for name in names for part in "AB"}


def in_layers(*names: str, layers: tuple[int, ...] = (0, 1), prefix: str = "model.layers.") -> set[str]:
    return {f"{prefix}{number}.{name}" for number in layers for name in names}


CONV = "transformer.h."
ACCEPTED: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "two layers of one list": (
        "llama",
        {"target_modules": Q, "layers_to_transform": 1, "layers_pattern": ["layers"]},
        lora_of("model.layers.1.self_attn.q_proj"),
    ),
    "a full name": (
        "llama",
        {"target_modules": ["model.layers.0.mlp.up_proj"]},
        lora_of("model.layers.0.mlp.up_proj"),
    ),
    "excluded": (
        "llama",
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ["v_proj"]},
        lora_of(*in_layers("self_attn.q_proj")),
    ),
    "norm and no other norm": (
        "llama",
        {"target_modules": Q, "modules_to_save": ["norm"]},
        lora_of(*in_layers("self_attn.q_proj")) | {"model.norm"},
    ),
    "head alone": ("llama", {"target_modules": ["lm_head"]}, {"lm_head"}),
    "tied head": ("tied", {"target_modules": ["lm_head", "q_proj"]}, lora_of(*in_layers("self_attn.q_proj")) | {"model.embed_tokens"}),
    "tied, both": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}, {"model.embed_tokens"}),
    "tied, apart as asked": (
        "tied",
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": False},
        {"model.embed_tokens", "lm_head"},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"]}, lora_of(*in_layers("attn.c_attn", prefix=CONV))),
    "conv1d and an embedding": (
        "gpt2",
        {"target_modules": ["c_fc", "wte"]},
        lora_of(*in_layers("mlp.c_fc", prefix=CONV)) | {"transformer.wte.lora_embedding_A", "transformer.wte.lora_embedding_B"},
    ),
    "conv1d and the tied head": (
        "gpt2",
        {"target_modules": ["c_attn", "lm_head"]},
        lora_of(*in_layers("attn.c_attn", prefix=CONV)) | {"transformer.wte"},
    ),
    "tied embedding of another name": (
        "gpt2",
        {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
        lora_of(*in_layers("attn.c_attn", prefix=CONV)) | {"transformer.wte"},
    ),
    "all linear": (
        "gpt2",
        {"target_modules": "all-linear"},
        lora_of(*in_layers("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", prefix=CONV)),
    ),
    "biases": (
        "qwen2",
        {"target_modules": Q, "bias": "lora_only"},
        lora_of(*in_layers("self_attn.q_proj")) | in_layers("self_attn.q_proj.bias"),
    ),
    "tokens": (
        "tied",
        {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [7, 250]}},
        lora_of(*in_layers("self_attn.q_proj")) | {"model.embed_tokens.token_adapter.trainable_tokens_delta"},
    ),
}  # fmt: skip


def trained(model: Any) -> set[str]:
    """Names of what trains, without PEFT's wrappers and without ".weight"."""
    cut = ("base_model.model.", ".base_layer", ".default", ".modules_to_save", ".weight")
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in cut:
        names = {name.replace(part, "") for name in names}
    return names


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_was_asked_trains_and_nothing_else(bases: dict[str, Path], tmp_path: Path, case: str) -> None:
    base, asked, expected = ACCEPTED[case]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out.*|.*did not match.*|.*were set but.*")
        model = FastLanguageModel.get_peft_model(load(bases[base]), r=4, **asked)
    assert trained(model) == expected
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        tuned = model.eval()(IDS).logits
        model.save_pretrained(tmp_path / "adapter")
        plain = stock(bases[base])
        assert (plain.eval()(IDS).logits - tuned).abs().max() > 1e-3
        assert_near(PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(IDS).logits, tuned)
        assert_near(load(tmp_path / "adapter").eval()(IDS).logits, tuned)
        model.save_pretrained_merged(tmp_path / "merged")
        assert_near(stock(tmp_path / "merged").eval()(IDS).logits, tuned, 1e-4, rtol=1e-4, atol=1e-4)


def test_conv1d_layers_are_adapted_as_stock_does(bases: dict[str, Path]) -> None:
    """The same A, B, loss and gradients as PEFT on stock with fan_in_fan_out=True."""
    model = FastLanguageModel.get_peft_model(load(bases["gpt2"]), r=4, target_modules=["c_attn", "c_proj"])
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    peft = get_peft_model(stock(bases["gpt2"]), config)
    assert any(isinstance(module, Conv1D) for module in peft.modules())
    assert model.peft_config["default"].fan_in_fan_out
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    theirs = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    assert list(ours) == list(theirs)
    with torch.no_grad():
        for name, parameter in theirs.items():
            ours[name].add_(0.02)
            parameter.copy_(ours[name])
    losses = [one.eval()(input_ids=IDS, labels=IDS).loss for one in (model, peft)]
    assert_near(*losses)
    for loss in losses:
        loss.backward()
    for name in ours:
        assert_near(ours[name].grad, theirs[name].grad, GRADIENTS, rtol=1e-4, atol=1e-7)


def test_fused_experts_are_found_under_their_old_names(bases: dict[str, Path]) -> None:
    model = FastLanguageModel.get_peft_model(load(bases["mixtral"]), r=4, target_modules=["q_proj", "w1", "w2", "w3"])
    assert any("experts" in name for name in trained(model))
    assert FastLanguageModel.get_peft_model(load(bases["mixtral"]), r=4, target_modules="all-linear") is not None


def test_quantised_parameters_cannot_be_targets(bases: dict[str, Path]) -> None:
    model = load(bases["llama"], load_in_4bit=True)
    with pytest.raises(OptionError, match=r"q_proj.weight is \[\d+, 1\] uint8, and LoRA needs a dense matrix"):
        FastLanguageModel.get_peft_model(model, r=4, target_modules=[], target_parameters=["q_proj.weight"])


def test_every_problem_is_listed_at_once(bases: dict[str, Path]) -> None:
    with pytest.raises(OptionError) as caught:
        FastLanguageModel.get_peft_model(
            load(bases["llama"]),
            target_modules=["q_prj", "k_proj"],
            exclude_modules=["zz"],
            rank_pattern={"v_proj": 2},
            layers_to_transform=[0, 7],
            modules_to_save=["lm_heat"],
        )
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize(
    ("asked", "layers"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, 3),
        ({"velora_config": {"num_groups": 4}}, 2),
    ],
)
def test_other_fields_take_effect_with_activation_checkpointing(
    bases: dict[str, Path], asked: dict[str, Any], layers: int
) -> None:
    """Equal to PEFT on stock without checkpointing; `layers`: how many have a LoRA."""
    model = FastLanguageModel.get_peft_model(
        load(bases["llama"]), r=4, target_modules=Q, use_gradient_checkpointing=True, **asked
    )
    config = LoraConfig(r=4, lora_alpha=16, target_modules=Q, task_type="CAUSAL_LM", **asked)
    peft = get_peft_model(stock(bases["llama"]), config).train()
    ours, theirs = ({n: p for n, p in one.named_parameters() if p.requires_grad} for one in (model, peft))
    assert sum("lora_A" in name for name in ours) == layers and list(ours) == list(theirs)
    with torch.no_grad():
        for name, parameter in theirs.items():
            ours[name].add_(0.02)
            parameter.copy_(ours[name])
    for one in (model.train(), peft):
        one(input_ids=IDS, labels=IDS).loss.backward()
    for name in ours:
        assert_near(ours[name].grad, theirs[name].grad, GRADIENTS, rtol=1e-4, atol=1e-6)
