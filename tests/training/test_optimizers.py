"""Optimizers by transformers' names, and full fine-tuning in bf16 whose small updates are not lost."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from training_kit import lora, on_cpu, rows, small
from trl import SFTTrainer

from hasten.errors import OptionError
from hasten.testing import tiny_tokenizer
from hasten.training import StochasticAdamW, sft_config, stochastic_adamw
from hasten.training.optimizers import STOCHASTIC

NAMES = {"adamw_8bit": (8, False), "paged_adamw_8bit": (8, True), "paged_adamw_32bit": (32, True)}
"""bitsandbytes' optimizers, as (bits of a moment, whether paged). Without a GPU it warns that it does not page."""
LAST, SAVED = 4, 2
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def fit(
    folder: Path,
    optim: str | torch.dtype,
    adapter: bool = False,
    dtype: torch.dtype = torch.float32,
    resume: bool = False,
) -> SFTTrainer:
    """Trains to step LAST, from step SAVED of an earlier call where `resume`. A dtype stands for `stochastic_adamw`'s moments."""
    model = small("llama", True, lora(r=32) if adapter else None).to(dtype)
    named = {} if isinstance(optim, torch.dtype) else {"optim": optim}
    args = sft_config(
        model, output_dir=str(folder), max_steps=LAST, save_steps=SAVED, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=1e-3, report_to="none", disable_tqdm=True, seed=5, bf16=False, **named,
    )  # fmt: skip
    chosen = stochastic_adamw(args, optim) if isinstance(optim, torch.dtype) else None
    data: Dataset = rows(16, seed=8)
    trainer = on_cpu(
        SFTTrainer(
            model, args=args, train_dataset=data, optimizer_cls_and_kwargs=chosen, processing_class=tiny_tokenizer()
        )
    )
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if resume else None)
    return trainer


def optimizer_of(trainer: SFTTrainer) -> Any:
    return trainer.optimizer.optimizer  # accelerate wraps it


def assert_same_end(one: SFTTrainer, other: SFTTrainer) -> None:
    """The same weights and the same state of the optimizer, to the bit and the dtype."""
    first, second = (dict(trainer.model.named_parameters()) for trainer in (one, other))
    assert all(torch.equal(second[name], p) for name, p in first.items())
    states = [list(optimizer_of(trainer).state.values()) for trainer in (one, other)]
    assert len(states[0]) == len(states[1]) > 5
    for mine, theirs in zip(*states, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            same = (
                value.dtype == theirs[key].dtype and torch.equal(value, theirs[key])
                if torch.is_tensor(value)
                else value == theirs[key]
            )
            assert same, key


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning:bitsandbytes.optim.optimizer")
@pytest.mark.grid(1)
@pytest.mark.parametrize("adapter", [True, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_names_of_transformers_reach_bitsandbytes_and_resume(name: str, adapter: bool, tmp_path: Path) -> None:
    whole = fit(tmp_path, name, adapter)
    optimizer = optimizer_of(whole)
    assert type(optimizer) is bitsandbytes.optim.AdamW
    assert (optimizer.args.optim_bits, optimizer.is_paged) == NAMES[name]
    kinds = {state["state1"].dtype for state in optimizer.state.values()}
    assert (torch.uint8 in kinds) == (NAMES[name][0] == 8)
    assert_same_end(fit(tmp_path, name, adapter, resume=True), whole)


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
def test_full_finetuning_in_bf16_resumes_to_the_bit(moments: torch.dtype, tmp_path: Path) -> None:
    whole = fit(tmp_path, moments, dtype=torch.bfloat16)
    assert type(optimizer_of(whole)) is StochasticAdamW
    assert {p.dtype for p in whole.model.parameters()} == {torch.bfloat16}
    assert {s["exp_avg"].dtype for s in optimizer_of(whole).state.values()} == {moments}
    torch.manual_seed(77)  # what else is drawn in the process does not matter
    assert_same_end(fit(tmp_path, moments, dtype=torch.bfloat16, resume=True), whole)


def test_its_loss_follows_that_of_fp32(tmp_path: Path) -> None:
    curves = []
    for optim, dtype in ((torch.bfloat16, torch.bfloat16), ("adamw_torch", torch.float32)):
        trainer = fit(tmp_path / str(dtype), optim, dtype=dtype)
        curves.append(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    assert len(curves[0]) == LAST and float((curves[0] - curves[1]).abs().max()) < 0.05 * float(curves[1].mean())


def walk(optimizer: Any, parameter: torch.Tensor, steps: int, gradient: float = 1.0) -> None:
    for _ in range(steps):
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()


def test_small_updates_are_not_lost() -> None:
    """200 steps of 1e-4 from 1.0, where bf16's neighbours are 4e-3 and 8e-3 away: AdamW stays, ours arrives on average."""
    start = torch.ones(4096, dtype=torch.bfloat16)
    plain, ours = start.clone().requires_grad_(), start.clone().requires_grad_()
    exact = torch.ones(4096).requires_grad_()
    walk(torch.optim.AdamW([plain], lr=1e-4, weight_decay=0.0), plain, 200)
    walk(torch.optim.AdamW([exact], lr=1e-4, weight_decay=0.0), exact, 200)
    walk(StochasticAdamW([ours], lr=1e-4, weight_decay=0.0, seed=1), ours, 200)
    assert torch.equal(plain.detach(), start)
    assert abs(float(exact.detach().mean()) - 0.98) < 1e-4
    assert abs(float(ours.detach().float().mean()) - 0.98) < 5e-4


def test_the_second_moment_decays_in_bf16() -> None:
    """0.1% a step is less than half of bf16's last place: rounded to the nearest it would stay for ever."""
    weights = {name: torch.ones(4096, dtype=torch.bfloat16).requires_grad_() for name in ("plain", "ours")}
    plain = torch.optim.AdamW([weights["plain"]], lr=0.0)
    ours = StochasticAdamW([weights["ours"]], lr=0.0, seed=1)
    found = {}
    for name, optimizer in (("plain", plain), ("ours", ours)):
        walk(optimizer, weights[name], 1, gradient=10.0)
        walk(optimizer, weights[name], 1000, gradient=0.0)
        found[name] = float(optimizer.state[weights[name]]["exp_avg_sq"].float().mean()) / 0.1
    assert found["plain"] > 0.99 and abs(found["ours"] - 0.999**1000) < 0.01


def test_seed_step_and_place_decide_the_roundings() -> None:
    def end(seed: int | None, noise: int, count: int = 2) -> list[torch.Tensor]:
        torch.manual_seed(noise)
        weights = [torch.ones(512, dtype=torch.bfloat16).requires_grad_() for _ in range(count)]
        optimizer = StochasticAdamW(weights, lr=1e-3, seed=seed)
        for _ in range(3):
            torch.rand(noise + 1)
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optimizer.step()
        return [weight.detach() for weight in weights]

    one, same, other, drawn, again = end(1, 0), end(1, 5), end(2, 0), end(None, 9), end(None, 9)
    assert torch.equal(one[0], same[0]) and torch.equal(one[1], same[1]) and torch.equal(drawn[0], again[0])
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], other[0]) and not torch.equal(one[0], drawn[0])


def test_a_run_of_torchs_adamw_is_taken_up() -> None:
    weight = torch.randn(64).requires_grad_()
    twin = weight.detach().clone().requires_grad_()
    theirs = torch.optim.AdamW([weight], lr=1e-2)
    walk(theirs, weight, 3)
    twin.data.copy_(weight.data)
    ours = StochasticAdamW([twin], lr=1.0, moments=torch.float32)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))  # torch shares what it loads
    for optimizer, parameter in ((theirs, weight), (ours, twin)):
        walk(optimizer, parameter, 2)
    torch.testing.assert_close(twin, weight, rtol=1e-6, atol=1e-6)


def test_groups_closures_and_weights_without_gradients() -> None:
    one, two, idle = (torch.ones(8, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    optimizer = StochasticAdamW([{"params": [one, idle]}, {"params": [two], "weight_decay": 0.5, "lr": 0.0}], lr=0.1)

    def closure() -> torch.Tensor:
        loss = (one * two).sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 8
    assert float(one.detach().float().mean()) < 0.95 and torch.equal(two.detach(), torch.ones_like(two))
    assert idle not in optimizer.state


def test_what_cannot_be_is_refused() -> None:
    weight = torch.ones(4).requires_grad_()
    for wrong in ({"moments": torch.float16}, {"lr": -1.0}, {"betas": (0.9, 1.0)}):
        with pytest.raises(ValueError, match="got"):
            StochasticAdamW([weight], **wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="float16"):
        StochasticAdamW([weight.detach().half().requires_grad_()])


def test_a_missing_package_and_a_name_for_job_files_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small("llama", True)
    with pytest.raises(OptionError, match=r"optimizer_cls_and_kwargs=hasten\.stochastic_adamw"):
        sft_config(model, output_dir=str(tmp_path), optim=STOCHASTIC)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"needs bitsandbytes.*hasten\[train\]"):
        sft_config(model, output_dir=str(tmp_path), optim="paged_adamw_8bit")
    with pytest.raises(OptionError, match="needs torchao"):
        sft_config(model, output_dir=str(tmp_path), optim="adamw_torch_8bit")


@pytest.mark.gpu
@gpu
def test_on_a_gpu_it_rounds_as_on_the_cpu() -> None:
    ends = []
    for device in ("cpu", "cuda"):
        weight = torch.linspace(0.5, 2, 5000).bfloat16().to(device).requires_grad_()
        walk(StochasticAdamW([weight], lr=1e-3, seed=3), weight, 3)
        ends.append(weight.detach().float().cpu())
    assert float((ends[0] != ends[1]).float().mean()) < 0.02
    torch.testing.assert_close(ends[0], ends[1], rtol=2**-6, atol=0)


@pytest.mark.gpu
@gpu
def test_on_a_gpu_it_needs_no_working_memory() -> None:
    weight = torch.ones(2**26, dtype=torch.bfloat16, device="cuda").requires_grad_()
    optimizer = StochasticAdamW([weight])
    walk(optimizer, weight, 1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 2**20


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_bitsandbytes_pages_and_resumes(name: str, tmp_path: Path) -> None:
    """`fit` trains where the model is, so this one moves it."""
    weights = {}
    for part in ("whole", "resumed"):
        model = small("llama", True).cuda()
        args = sft_config(
            model, output_dir=str(tmp_path), max_steps=LAST, save_steps=SAVED, per_device_train_batch_size=4, optim=name,
            report_to="none", disable_tqdm=True, seed=5,
        )  # fmt: skip
        trainer = SFTTrainer(model, args=args, train_dataset=rows(16, seed=8), processing_class=tiny_tokenizer())
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}") if part == "resumed" else None)
        assert optimizer_of(trainer).is_paged == NAMES[name][1]
        weights[part] = [p.detach().clone() for p in trainer.model.parameters()]
    for mine, theirs in zip(weights["resumed"], weights["whole"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
