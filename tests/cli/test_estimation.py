"""The estimate's parts against counts taken from real (tiny) models, and how they answer to each argument."""

from pathlib import Path

import pytest
import torch
from torch import nn

from hasten.errors import CheckpointError, OptionError
from hasten.estimation import ADAM_FP32_BYTES, Estimate, estimate
from hasten.testing.tiny import save_tiny, tiny_config, tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "cohere"])
def test_dense_weights_are_the_models_own_bytes(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    real = sum(p.numel() * p.element_size() for p in model.parameters())
    assert estimate(tiny_config(family), quantization=None).weights == real


def test_nf4_weights_are_what_bitsandbytes_stores() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    model = tiny_model("llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    real = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            packed, state = bnb.quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            real += packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    found = estimate(model.config)
    dense = estimate(model.config, quantization=None)
    linears = sum(
        m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()
    )
    assert found.weights - (dense.weights - 2 * linears) == pytest.approx(real, rel=1e-3)


def test_trained_part_is_the_adapters_own_parameters() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(r=8, target_modules="all-linear"))
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate(tiny_config("llama"), rank=8).trained == adapter * ADAM_FP32_BYTES


def test_stored_activations_with_checkpointing_are_the_layers_inputs() -> None:
    config = tiny_config("llama")
    kept = []
    model = tiny_model("llama", dtype=torch.bfloat16)
    hooks = [layer.register_forward_pre_hook(lambda _, args: kept.append(args[0])) for layer in model.model.layers]
    model(input_ids=torch.ones(2, 16, dtype=torch.long))
    assert len(hooks) == len(kept) == 4
    found = estimate(config, batch_size=2, seq_len=16)
    assert found.stored_activations == sum(x.nbytes for x in kept)


def test_saved_tensors_of_a_layer_are_covered() -> None:
    """What autograd saves in one stock layer, fp32, is of the size that the working set says (eager ops save more)."""
    model = tiny_model("llama").train()
    layer, batch, length = model.model.layers[0], 2, 32
    hidden = torch.randn(batch, length, 64, requires_grad=True)
    rope = model.model.rotary_emb(hidden, torch.arange(length)[None])
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden, position_embeddings=rope)
    part = estimate(model.config, batch_size=batch, seq_len=length, quantization=None, dtype=torch.float32)
    assert 0.5 < part.layer_working_set / sum(seen.values()) < 2.0


def test_each_part_answers_to_its_argument() -> None:
    config = tiny_config("llama")
    base = estimate(config, batch_size=1, seq_len=512)
    longer = estimate(config, batch_size=1, seq_len=1024)
    assert longer.stored_activations == 2 * base.stored_activations and longer.weights == base.weights
    assert estimate(config, batch_size=2, seq_len=512) == longer
    assert estimate(config, seq_len=512, checkpointing=False).stored_activations > base.stored_activations
    full = estimate(config, seq_len=512, quantization=None, full_finetuning=True)
    assert full.trained == 3 * full.weights
    four, eight, dense = (estimate(config, quantization=q).weights for q in ("4bit", "8bit", None))
    assert four < eight < dense
    assert base.total == sum(base.parts().values()) and len(base.parts()) == len(Estimate.__dataclass_fields__)


def test_a_folder_is_read_by_its_config_alone(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    assert estimate(folder, seq_len=64) == estimate(tiny_config("llama"), seq_len=64)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        estimate(tiny_config("llama"), batch_size=0, rank=-1, quantization="4bit", full_finetuning=True)
    assert len(caught.value.problems) == 3
    with pytest.raises(CheckpointError, match="no config"):
        estimate(tmp_path)
