"""Guarantees of training: the curve is stock's, runs repeat and resume exactly, dtypes and memory modes change nothing."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import read_metrics, write_job
from device_kit import DEVICE, GRADIENTS, ON_GPU, matches
from guarantee_jobs import KILLED, RANKS, SAVED, STEPS, job_file, one_step, rank_of_ddp, rank_of_fsdp, train
from guarantee_kit import IDS, adapted, anonymous, as_json, fresh, load, logits, losses, read, same, stock, trainer
from peft import LoraConfig, get_peft_model
from training_kit import gradients_apart, gradients_of, hf, rows
from transformers import EarlyStoppingCallback

from hasten import FastLanguageModel, estimate, report
from hasten.errors import OptionError, PatchError, TrainingError
from hasten.training.config import read_job
from hasten.training.job import run
from hasten.training.metrics import StepMetrics


def like(model: Any, folder: Path, **options: Any) -> Any:
    """Plain PEFT with the same adapter tensors as `model`'s."""
    config = LoraConfig(**{**model.peft_config["default"].to_dict(), **options})
    other = get_peft_model(stock(folder), config)
    assert not other.load_state_dict(
        {n: p for n, p in model.named_parameters() if "lora" in n}, strict=False
    ).unexpected_keys
    return other.train()


def test_r18_the_loss_curve_is_that_of_transformers_and_peft(plain: Path, tmp_path: Path) -> None:
    """Fifty steps log the losses of unmodified transformers and PEFT; training and evaluation mode give the same logits."""
    model, tokenizer = adapted(plain, {"r": 4})
    other = like(model, plain)
    how = {"max_steps": 50, "learning_rate": 5e-3, "seed": 3}
    ours, theirs = (
        trainer(model, tokenizer, rows(24), tmp_path, **how),
        hf(other, rows(24), tmp_path, use_cpu=not ON_GPU, **how),
    )
    ours.train(), theirs.train()
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=1e-4, atol=0)
    assert losses(ours)[-1] < losses(ours)[0]
    with torch.no_grad():
        assert matches(model.train()(IDS).logits, model.eval()(IDS).logits)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of one job: run whole, run whole again, killed and resumed. Each in a process of its own."""
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "again", "killed")]
    paths = [job_file(folder) for folder in folders]
    codes = fresh((train, (paths[0],)), (train, (paths[1],)), (train, (paths[2], False, KILLED)))
    assert codes == [0, 0, -signal.SIGKILL]
    assert not (folders[2] / "out/model").exists() and (folders[2] / f"out/checkpoint-{SAVED}").exists()
    assert fresh((train, (paths[2], True))) == [0]
    return folders


def curve(folder: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["learning_rate"]) for row in read_metrics(folder / "out/metrics.jsonl")]


def test_r19_the_same_seed_is_the_same_run(runs: list[Path]) -> None:
    """Two fresh processes with one job write the same losses and the same adapter, bit for bit."""
    assert curve(runs[0]) == curve(runs[1]) and len(curve(runs[0])) == STEPS
    assert same(read(runs[0] / "out/model"), read(runs[1] / "out/model"))


def test_r21_a_resumed_run_is_the_run_that_was_not_killed(runs: list[Path]) -> None:
    """A run killed without warning and resumed ends with the same weights, optimizer state and losses, bit for bit."""
    assert curve(runs[2]) == curve(runs[0])
    assert same(read(runs[2] / "out/model"), read(runs[0] / "out/model"))
    ends = [folder / f"out/checkpoint-{STEPS}" for folder in (runs[0], runs[2])]
    assert same(*(read(end) for end in ends))
    for name in [path.name for path in ends[0].iterdir() if path.name.startswith(("optimizer", "scheduler"))]:
        states = [(end / name).read_bytes() for end in ends]
        assert states[0] == states[1], name


def test_r22_checkpoints_hold_no_pickle(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is safetensors and JSON alone, and a run resumes from it without torch.load."""
    checkpoint = runs[0] / f"out/checkpoint-{SAVED}"
    assert {path.suffix for path in checkpoint.iterdir()} <= {".safetensors", ".json", ".jinja", ".md"}

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("torch.load was called")

    path = job_file(tmp_path)
    train(path)
    for later in (tmp_path / f"out/checkpoint-{STEPS}").iterdir():
        later.unlink()
    (tmp_path / f"out/checkpoint-{STEPS}").rmdir()
    monkeypatch.setattr(torch, "load", refuse)
    train(path, resume=True)
    assert same(read(tmp_path / "out/model"), read(runs[0] / "out/model"))


def test_r16_overflow_is_refused_or_stops_the_run(tmp_path: Path) -> None:
    """Families that overflow fp16 are refused in it by name, and a loss or gradient that is not finite stops a run at its step."""
    from hasten.testing import save_tiny

    gemma = save_tiny(tmp_path / "gemma", "gemma", num_hidden_layers=2)
    with pytest.raises(OptionError, match="bfloat16 or float32"):
        load(gemma, dtype=torch.float16)
    job = read_job(write_job(tmp_path, train={"learning_rate": 1e36, "max_grad_norm": 0.0, "save_strategy": "no"}))
    with pytest.raises(TrainingError, match=r"step [23]: .* not finite"):
        run(job, FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model)
    assert not (tmp_path / "out/model").exists()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("autocast", [False, True])
def test_r38_activation_checkpointing_changes_no_number(plain: Path, dropout: float, autocast: bool) -> None:
    """Recomputing or offloading activations gives the same loss and gradients, under autocast and with seeded LoRA dropout too."""
    found = []
    for mode in (False, True, "offload", "unsloth"):
        how = {"lora_dropout": dropout, "init_lora_weights": False, "use_gradient_checkpointing": mode}
        model, _ = adapted(plain, how, use_gradient_checkpointing=mode)
        torch.manual_seed(7)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        found.append((loss.detach(), gradients_of(model)))
    for loss, gradients in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert gradients_apart(gradients, found[0][1]) <= (
            1e-5 if ON_GPU else 0
        )  # torch's attention is not deterministic there


@pytest.mark.parametrize("four", [False, True], ids=["dense", "NF4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_r39_any_dtypes_go_together(plain: Path, dtype: torch.dtype, four: bool) -> None:
    """Base dtype, adapter dtype, autocast, 4 bits and recomputation combine freely; gradients have their parameter's dtype."""
    for wide in (True, False):
        for mode in (False, True):
            model, _ = adapted(
                plain,
                {"use_gradient_checkpointing": mode},
                dtype=dtype,
                load_in_4bit=four,
                float32_mixed_precision=wide,
            )
            for autocast in (False, True):  # of the base's dtype, as trainers set it
                with torch.autocast(DEVICE, dtype if dtype.itemsize == 2 else torch.bfloat16, enabled=autocast):
                    loss = model.train()(IDS, labels=IDS).loss
                loss.backward()
                assert math.isfinite(loss.detach())
            trained = [p for p in model.parameters() if p.requires_grad]
            assert trained and all(p.grad is not None and p.grad.dtype == p.dtype for p in trained)
            assert {p.dtype for p in trained} == {torch.float32 if wide else dtype}


def test_r40_memory_stays_flat(plain: Path) -> None:
    """Two hundred steps with evaluations in between hold no more memory at the end than after the warm-up."""
    model, _ = adapted(plain)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    seen = []
    for step in range(200):
        model.train()(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            logits(model)
            seen.append(anonymous() + torch.cuda.memory_allocated())
    assert max(seen[5:]) - seen[4] < 4 * 2**20, [round(size / 2**20, 1) for size in seen]


def test_r41_memory_is_predicted_and_grows_linearly(plain: Path) -> None:
    """The estimate of a step's peak is linear in the sequence length and lists what would lower it, largest gain first."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True,
    )  # fmt: skip
    totals = [estimate(config, seq_len=length, batch_size=4).total for length in (8192, 16384, 24576, 32768)]
    steps = [b - a for a, b in zip(totals, totals[1:], strict=False)]
    assert max(steps) < 1.1 * min(steps) and min(steps) > 0
    found = estimate(config, seq_len=8192, batch_size=4, checkpointing=False, quantization=None, memory_budget="8GiB")
    assert not found.fits and len(found.savings) >= 3
    gains = [saving.gain for saving in found.savings]
    assert gains == sorted(gains, reverse=True) and sum(found.parts().values()) == found.total


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_r41_the_predicted_peak_is_the_measured_one(tmp_path: Path) -> None:
    """On a GPU the predicted peak of a step is within 15% of the measured one."""
    from hasten.testing import save_tiny

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16}
    folder = save_tiny(tmp_path, "llama", dtype=torch.bfloat16, vocab_size=32000, max_position_embeddings=4096, **sizes)
    model, _ = adapted(folder, {"r": 16}, dtype=torch.bfloat16, max_seq_length=4096)
    ids = torch.randint(6, 32000, (2, 4096), device=model.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    predicted = estimate(folder, batch_size=2, seq_len=4096, quantization=None, checkpointing=False).total
    assert abs(predicted / torch.cuda.max_memory_allocated() - 1) < 0.15


def test_r35_two_ranks_train_as_one_on_both_batches(plain: Path, tmp_path: Path) -> None:
    """Data-parallel ranks average to the gradients of one process on the joined batch."""
    assert fresh(*((rank_of_ddp, (rank, plain, tmp_path)) for rank in range(RANKS))) == [0, 0]
    assert torch.load(tmp_path / "world.pt", weights_only=True) == RANKS
    model, _ = adapted(plain, {"init_lora_weights": False}, device_map="cpu")
    ids = IDS.cpu()
    model.train()(ids, labels=ids).loss.backward()
    found = torch.load(tmp_path / "grads.pt", weights_only=True)
    assert gradients_apart(found, gradients_of(model)) < 1e-5


def test_r36_sharded_training_saves_the_adapter_of_one_process(plain: Path, tmp_path: Path) -> None:
    """A model sharded by FSDP2 takes the step of one process, and its adapter is saved under the same names."""
    assert fresh(*((rank_of_fsdp, (rank, plain, tmp_path)) for rank in range(RANKS))) == [0, 0]
    model, _ = adapted(plain, {"init_lora_weights": False}, device_map="cpu")
    one_step(model.train(), IDS.cpu())
    wanted = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    found = torch.load(tmp_path / "adapter.pt", weights_only=True)
    assert found.keys() == wanted.keys()
    assert all(float((tensor - wanted[name]).abs().max()) < 1e-6 for name, tensor in found.items())


def test_r43_the_report_says_what_runs_and_why(tmp_path: Path) -> None:
    """Biases and LoRA dropout give stock's gradients, and the report names every layer that leaves the fused path, with the reason; in strict mode it raises."""
    from hasten.testing import save_tiny

    folder = save_tiny(tmp_path, "qwen2", num_hidden_layers=2)
    model, _ = adapted(folder, {"lora_dropout": 0.3, "init_lora_weights": False}, full_finetuning=False)
    other = like(model, folder)
    seen = []
    for one in (model, other):
        torch.manual_seed(5)
        one.train()(IDS, labels=IDS).loss.backward()
        seen.append(gradients_of(one))
    assert gradients_apart(*seen) < (GRADIENTS if ON_GPU else 1e-4)
    table = report(model)
    unfused = [row for row in table.rows if "unfused" in row.runs]
    assert sum(row.count for row in unfused) == 14 and all("dropout" in row.why for row in unfused)
    with pytest.raises(PatchError, match=r"(?s)7 kinds.*q_proj.*dropout"):
        report(model, strict=True)
    fused = report(adapted(folder)[0], strict=True)
    assert not [row for row in fused.rows if "unfused" in row.runs]
    assert sum(row.count for row in fused.rows if "overlay" in row.runs) >= 2 * 4 + 1


def test_r48_every_step_is_in_the_metrics(tmp_path: Path) -> None:
    """Every step writes one JSON line whose sums are exact, and transformers' early stopping works."""
    path = write_job(tmp_path, train={"num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 4})
    done = run(read_job(path), FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model)
    lines = read_metrics(tmp_path / "out/metrics.jsonl")
    assert [row["step"] for row in lines] == list(range(1, done.steps + 1)) and done.steps == 4
    assert all(row.keys() == StepMetrics.__dataclass_fields__.keys() for row in lines)
    assert sum(row["tokens"] for row in lines) == done.counts.tokens == lines[-1]["total_tokens"]
    assert sum(row["learned_tokens"] for row in lines) == done.counts.labels
    assert as_json(tmp_path / "out/summary.json")["dataset"]["truncated"] == 0
    assert json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])["eta_seconds"] == 0
    model, tokenizer = adapted(tmp_path / "base")
    stops = trainer(
        model, tokenizer, rows(8), tmp_path, max_steps=30, eval_strategy="steps", eval_steps=1, save_steps=1,
        save_strategy="steps", learning_rate=0.0, eval_dataset=rows(4), load_best_model_at_end=True, metric_for_best_model="eval_loss",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    stops.train()
    assert stops.state.global_step == 3
