"""Guarantees of numbers: positions, adapters, losses, families, kernels."""

import ast
import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from device_kit import DEVICE, GRADIENTS, ON_GPU, matches
from export_kit import train as stir
from guarantee_kit import IDS, adapted, load, logits, stock, trainer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from training_kit import gradients_apart, gradients_of, rows

import hasten
from hasten import check_family
from hasten.errors import AccuracyError, CheckpointError, ContractError
from hasten.families import FAMILIES
from hasten.ops import ScoreConfig, linear_cross_entropy, linear_cross_entropy_loss, norm
from hasten.ops.backend import backend_for, interpreted_kernels
from hasten.ops.norm import NormConfig
from hasten.overlays.cache_name import CACHE
from hasten.testing import save_tiny, tiny_model

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 32,
    },
}
KERNELS = [path for path in (Path(hasten.__file__).parent / "ops").rglob("*.py") if "import triton" in path.read_text()]


@pytest.mark.parametrize("kind", ROPES)
def test_r10_long_prompts_and_generation_past_the_old_limit(kind: str, tmp_path: Path) -> None:
    """Prompts and generated text beyond a checkpoint's own context get transformers' logits, whatever the kind of RoPE scaling."""
    rope = {"rope_theta": 10000.0, **ROPES[kind]}
    folder = save_tiny(tmp_path, "llama", num_hidden_layers=2, max_position_embeddings=64, rope_parameters=rope)
    model, _ = load(folder, max_seq_length=128)
    plain = stock(folder, config=model.config)
    ids = torch.randint(6, 260, (1, 128), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    for length in (63, 64, 65, 128):
        assert matches(logits(model, ids[:, :length]), logits(plain, ids[:, :length])), length
    model.for_inference()
    found, wanted = (one.generate(ids[:, :56], max_new_tokens=20, do_sample=False) for one in (model, plain))
    assert torch.equal(found, wanted) and found.shape[1] > 65
    with torch.no_grad():
        past, steps = None, []
        for part in (ids[:, :100], *ids[:, 100:].split(1, dim=1)):
            out = model(part, **{CACHE: past}, use_cache=True)
            past, steps = out[CACHE], [*steps, out.logits]
    torch.testing.assert_close(torch.cat(steps, dim=1).cpu(), logits(plain, ids), rtol=1e-4, atol=2e-4)


def test_r11_an_adapter_is_applied_whole_or_refused(llama: Path, tmp_path: Path) -> None:
    """A loaded adapter gives the logits that were saved; one key missing, renamed or left over is an error that names it."""
    model, tokenizer = adapted(llama)
    stir(model)
    wanted = logits(model)
    model.save_pretrained_merged(tmp_path / "good", tokenizer, save_method="lora")
    again = logits(load(tmp_path / "good")[0])
    assert torch.equal(again, wanted) and not torch.allclose(again, logits(stock(llama)), atol=0.1)
    tensors = load_file(tmp_path / "good/adapter_model.safetensors")
    name = next(iter(tensors))
    renamed = name.replace("model.layers", "language_model.layers")
    for number, changed in enumerate(
        (
            {n: t for n, t in tensors.items() if n != name},
            {renamed if n == name else n: t for n, t in tensors.items()},
            {**tensors, "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)},
        )
    ):
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / f"bad{number}"))
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=r"lora_[AB]"):
            load(folder)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_r12_the_fused_loss_trains_the_adapter_of_the_head(family: str, tmp_path: Path) -> None:
    """A LoRA on the head gets, through the fused loss, the gradients that unmodified PEFT gives it."""
    folder = save_tiny(tmp_path, family, num_hidden_layers=2, tie_word_embeddings=False)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    seen = []
    for base in (load(folder)[0], stock(folder)):
        torch.manual_seed(3)
        model = get_peft_model(base, config).train()
        model(IDS, labels=IDS).loss.backward()
        seen.append(gradients_of(model))
    assert gradients_apart(*seen) < (GRADIENTS if ON_GPU else 1e-4)
    assert all(float(g.norm()) > 0 for name, g in seen[0].items() if "lm_head" in name)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_r12_the_fused_loss_is_cross_entropy_in_fp64(backend: Any) -> None:
    """Loss and gradients of the fused cross entropy are torch's in fp64, with softcap, scale, smoothing, bias and any reduction."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (9, 16), "weight": (37, 16), "bias": (37,)}
    values = {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}
    labels = torch.tensor([3, -100, 36, 0, 5, -100, 7, 7, 20], device=DEVICE)
    upstream = torch.rand(9, generator=generator).to(DEVICE)
    config = ScoreConfig(logit_scale=0.5, softcap=3.0, label_smoothing=0.1)
    for reduction in ("none", "sum", "mean"):
        grads = []
        for wide in (False, True):
            h, w, b = (
                v.to(torch.float64 if wide else torch.float32, copy=True).requires_grad_() for v in values.values()
            )
            if wide:
                z = 3.0 * torch.tanh((h @ w.T + b) * 0.5 / 3.0)
                loss = F.cross_entropy(z, labels, reduction=reduction, label_smoothing=0.1)
            elif reduction == "none":
                loss = linear_cross_entropy(h, w, labels, config, bias_V=b, backend=backend).loss
            else:
                over = None if reduction == "mean" else 1.0
                loss = linear_cross_entropy_loss(h, w, labels, config, over, bias_V=b, backend=backend)
            (loss * upstream if reduction == "none" else 3.0 * loss).sum().backward()
            grads.append([loss.detach().double(), *(v.grad.double() for v in (h, w, b))])
        for mine, exact in zip(*grads, strict=True):
            assert float((mine - exact).norm() / exact.norm()) < 1e-5


def test_r13_kernels_take_any_strides_and_count_offsets_in_64_bits() -> None:
    """Kernels give the reference's values for tensors that are not contiguous; the offset of a row is a 64-bit number in each."""
    x = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE).t()[::2]
    assert not x.is_contiguous()
    config, weight = NormConfig(1e-6, "rms"), torch.ones(24, device=DEVICE)
    torch.testing.assert_close(norm(x, weight, config, "triton"), norm(x, weight, config, "reference"))
    assert KERNELS
    for path in KERNELS:
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or "jit" not in "".join(
                map(ast.unparse, function.decorator_list)
            ):
                continue
            text = ast.unparse(function)
            if "tl.program_id" in text and "stride" in text:
                assert "int64" in text, f"{path.name}: {function.name} computes offsets in 32 bits"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 40 GiB")
def test_r13_tensors_of_more_than_2_to_the_31_elements() -> None:
    """On a GPU the last rows of a tensor of more than 2^31 elements are right."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    x = torch.zeros(2**31 // 4096 + 8, 4096, device="cuda", dtype=torch.bfloat16)
    x[-4:] = torch.randn(4, 4096, device="cuda")
    config, weight = NormConfig(1e-6, "rms"), torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(norm(x, weight, config)[-4:], norm(x[-4:].clone(), weight, config, "reference"))


@pytest.mark.parametrize("family", ["cohere", "cohere2"])
def test_r17_cohere_is_transformers_and_every_wrong_fact_fails(family: str) -> None:
    """Command R models give transformers' logits, losses and gradients; a wrong norm, rotation, scale or window is caught."""
    facts = FAMILIES[family]
    assert len(check_family(facts).rows) > 50
    wrong = [
        dataclasses.replace(facts, norm=dataclasses.replace(facts.norm, kind="rms")),
        dataclasses.replace(facts, attention=dataclasses.replace(facts.attention, rotation="half")),
        dataclasses.replace(facts, head=dataclasses.replace(facts.head, multiplier=None)),
    ]
    if family == "cohere2":
        wrong.append(dataclasses.replace(facts, attention=dataclasses.replace(facts.attention, window="never")))
    for changed in wrong:
        with pytest.raises((AccuracyError, ContractError)):
            check_family(changed)
    if family == "cohere":
        plain = tiny_model(family, use_qk_norm=False, logit_scale=0.5)
        assert check_family(facts, plain) is not None


def test_r37_kernels_run_on_the_device_of_their_tensors() -> None:
    """Every launch of a kernel first makes the device of its tensors the current one."""
    launches = 0
    for path in KERNELS:
        tree = ast.parse(path.read_text())
        guarded = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.With) and any("on_device" in ast.unparse(item) for item in node.items)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launches += 1
                assert id(node) in guarded, f"{path.name}:{node.lineno} launches on the current device"
    assert launches >= 10


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_r37_a_model_split_over_two_gpus_is_the_model_on_one(llama: Path) -> None:
    """A model split over two GPUs gives the loss and gradients of the same model on one."""
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{index}": index // 2 for index in range(4)}
    seen = []
    for device_map in ("cuda:0", places):
        model, _ = adapted(llama, {"init_lora_weights": False}, device_map=device_map)
        torch.cuda.set_device(0)
        model.train()(IDS.to("cuda:0"), labels=IDS.to("cuda:0")).loss.backward()
        seen.append({name: g.cpu() for name, g in gradients_of(model).items()})
    assert gradients_apart(*seen) < 1e-5


def test_r42_lengths_do_not_recompile(plain: Path) -> None:
    """Thirty sequence lengths under torch.compile on a CPU are compiled a few times in all, without a graph break."""
    model, _ = load(plain, full_finetuning=True, device_map="cpu")  # the launches of the kernels are not traced
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model.train(), backend=counter, fullgraph=True, dynamic=True)
    for length in range(8, 38):
        ids = torch.arange(6, 6 + length)[None]
        loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        torch.testing.assert_close(loss, model(input_ids=ids, labels=ids, use_cache=False).loss)
    assert 1 <= counter.frame_count <= 3


def test_r47_the_same_model_runs_on_torch_and_on_kernels(plain: Path) -> None:
    """On a CPU everything runs in plain torch; the kernels, on a GPU or in Triton's interpreter, give the same loss and gradients."""
    seen = []
    for context, where, backend in (
        (contextlib.nullcontext, {"device_map": "cpu"}, "reference"),
        (interpreted_kernels, {}, "triton"),
    ):
        with context():
            model, _ = adapted(plain, {"init_lora_weights": False}, **where)
            ids = IDS[:1, :12].to(model.device)
            assert backend_for(torch.zeros(1, device=model.device)) == backend
            loss = model.train()(ids, labels=ids).loss
            loss.backward()
            seen.append((loss.detach().cpu(), {name: g.cpu() for name, g in gradients_of(model).items()}))
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-5, atol=1e-5)
    assert gradients_apart(seen[0][1], seen[1][1]) < 1e-4


def test_r30_metrics_need_no_environment_variable(plain: Path, tmp_path: Path) -> None:
    """`compute_metrics` gets real logits in evaluation, and the token accuracy that is logged in training is that of real logits."""
    model, tokenizer = load(plain, full_finetuning=True)
    got: list[torch.Tensor] = []

    def metrics(prediction: Any) -> dict[str, float]:
        got.append(torch.as_tensor(prediction.predictions))
        return {"shape": float(got[-1].shape[-1])}

    data = rows(4)
    done = trainer(model, tokenizer, data, tmp_path, eval_dataset=data)
    done.compute_metrics = metrics
    with pytest.warns(FutureWarning, match="return_outputs=True"):  # TRL will stop giving logits to metrics
        assert done.evaluate()["eval_shape"] == 288.0
    plain_model = stock(plain)
    for row, found in zip(data, got[0], strict=True):
        wanted = logits(plain_model, torch.tensor([row["input_ids"]]))[0]
        torch.testing.assert_close(found[: len(wanted)], wanted, rtol=1e-4, atol=1e-4)
    right = total = 0
    for row in data:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        kept = labels[1:] != -100
        right += int((logits(plain_model, ids[None])[0, :-1].argmax(-1)[kept] == labels[1:][kept]).sum())
        total += int(kept.sum())
    done.train()
    logged = [entry["mean_token_accuracy"] for entry in done.state.log_history if "mean_token_accuracy" in entry]
    assert abs(logged[0] - right / total) < 1e-4
