"""Damaged checkpoints are named and skipped; those of other runs are refused with every difference; finished runs stay as they are."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_kit import STEPS, TRAIN, Stopped, chats, job_in, train
from safetensors.torch import load_file, save_file

from hasten import FastLanguageModel
from hasten.errors import CheckpointError, TrainingError
from hasten.testing.tiny import save_tiny
from hasten.training.checkpoints import MANIFEST, WRITING, Checkpoint, examine, last_whole
from hasten.training.resume import sole_writer


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that stopped in step 5, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped") / "job"
    with pytest.raises(Stopped):
        train(job_in(folder), stop_at=5)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "job"
    train(job_in(folder))
    return folder


@pytest.fixture
def job(stopped: Path, tmp_path: Path) -> Path:
    """A copy of `stopped`."""
    return shutil.copytree(stopped, tmp_path / "job")


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished`."""
    return shutil.copytree(finished, tmp_path / "job")


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "out/metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]


def without_manifest(folder: Path) -> Path:
    (folder / MANIFEST).unlink()
    return folder


FILES = (
    "adapter_model.safetensors", "adapter_config.json", "optimizer.json", "optimizer.safetensors", "scheduler.json",
    "rng_state.json", "rng_state.safetensors", "trainer_state.json", "training_args.json", "tokenizer.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "flipped", "swapped"])
def test_a_damaged_file_makes_the_older_checkpoint_the_last(job: Path, name: str, how: str, caplog: Any) -> None:
    newest = job / "out/checkpoint-4"
    assert last_whole(job / "out").step == 4
    path = newest / name
    raw = path.read_bytes()
    middle = len(raw) // 2
    made = {
        "missing": None,
        "truncated": raw[:middle],
        "empty": b"",
        "flipped": raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :],
        "swapped": b"x" * len(raw),
    }[how]
    path.unlink() if made is None else path.write_bytes(made)
    found = examine(newest)
    assert isinstance(found, list) and (
        name in " ".join(found) or "state" in " ".join(found) or "weights" in " ".join(found)
    )
    with caplog.at_level(logging.WARNING):
        assert last_whole(job / "out").step == 2
    assert "checkpoint-4" in caplog.text and "skipping" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "optimizer.json",
        "optimizer.safetensors",
        "scheduler.json",
        "rng_state.json",
        "rng_state.safetensors",
        "trainer_state.json",
    ],
)
def test_without_a_manifest_too(job: Path, name: str) -> None:
    """As other programs write checkpoints: what is needed must be there, and archives must be whole."""
    assert isinstance(examine(without_manifest(job / "out/checkpoint-4")), Checkpoint)
    path = job / "out/checkpoint-4" / name
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    assert last_whole(job / "out").step == 2
    path.unlink()
    assert last_whole(job / "out").step == 2


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"files": 3}', '{"files": {"": [0, ""]}, "fingerprint": {}, "versions": {}}', "[" * 100_000,
     '{"files": {"../../job.yaml": [1, "a"]}, "fingerprint": {}, "versions": {}}',
     '{"files": {}, "fingerprint": {}, "versions": {}}', '{"files": {"a": 3}, "fingerprint": {}, "versions": {}}'],
)  # fmt: skip
def test_damaged_manifests(job: Path, content: str) -> None:
    (job / "out/checkpoint-4" / MANIFEST).write_text(content)
    assert last_whole(job / "out").step == 2


def test_a_checkpoint_under_another_name_is_not_whole(job: Path) -> None:
    (job / "out/checkpoint-4").rename(job / "out/checkpoint-9")
    assert last_whole(job / "out").step == 2


def test_no_whole_checkpoint_names_what_is_wrong_with_each(job: Path) -> None:
    for step in (2, 4):
        (job / f"out/checkpoint-{step}/optimizer.safetensors").unlink()
    with pytest.raises(
        TrainingError, match=r"(?s)no whole checkpoint.*checkpoint-4.*optimizer.*checkpoint-2.*optimizer"
    ):
        train(job / "job.yaml", resume=True)


def test_a_resumed_run_is_bit_equal_and_sets_damage_aside(job: Path, finished: Path) -> None:
    """From checkpoint 2, since 4 is damaged; a killed save's leftovers disappear."""
    (job / "out/checkpoint-4/scheduler.json").unlink()
    (job / "out" / WRITING / "checkpoint-6").mkdir(parents=True)
    result = train(job / "job.yaml", resume=True)
    assert result.steps == STEPS and losses(job) == losses(finished)
    for name in ("checkpoint-6", "model"):
        ours, theirs = (load_file(folder / "out" / name / "adapter_model.safetensors") for folder in (job, finished))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    names = sorted(path.name for path in (job / "out").iterdir())
    assert [name for name in names if not name.startswith(".")] == sorted(p.name for p in (finished / "out").iterdir())
    assert [name for name in names if name.startswith(".")][0].startswith(".checkpoint-4.damaged-")
    assert isinstance(examine(job / "out/checkpoint-4"), Checkpoint)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "learning rate": ({"train": {"learning_rate": 0.02}}, "train.learning_rate: 0.01 in the checkpoint, 0.02 now"),
    "seed": ({"train": {"seed": 2}}, "train.seed: 1 .* 2 now"),
    "batch": ({"train": {"per_device_train_batch_size": 4}}, "train.per_device_train_batch_size: 2 .* 4 now"),
    "schedule": ({"train": {"lr_scheduler_type": "linear"}}, "schedule.type: cosine .* linear now"),
    "length of a cosine": ({"train": {"max_steps": 8}}, "schedule.length: 6 steps .* 8 steps now"),
    "warmup": ({"train": {"warmup_steps": 1}}, "schedule.warmup steps: 0 .* 1 now"),
    "alpha": ({"adapter": {"lora_alpha": 32}}, "adapter.lora_alpha: 16 .* 32 now"),
    "dropout": ({"adapter": {"lora_dropout": 0.1}}, "adapter.lora_dropout: 0 .* 0.1 now"),
    "precision": ({"model": {"dtype": "float32"}}, "model.dtype: torch.bfloat16 .* torch.float32 now"),
    "format": ({"model": {"load_in_4bit": True}}, "model.weight format: .* nf4 now"),
    "length of sequences": ({"model": {"max_seq_length": 32}}, "train.max_length: 64 .* 32 now"),
    "labels": ({"train": {"assistant_only_loss": False}}, "data.content: "),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_are_refused_by_name(job: Path, name: str) -> None:
    changes, message = OTHERS[name]
    before = losses(job)
    with pytest.raises(TrainingError, match=f"(?s){message}.*--resume force.*new folder"):
        train(job_in(job, **changes), resume=True)
    assert losses(job) == before


def test_every_difference_is_listed_and_may_be_forced(job: Path, caplog: Any) -> None:
    path = job_in(job, train={"learning_rate": 0.02, "seed": 2}, adapter={"lora_alpha": 8})
    with pytest.raises(TrainingError, match=r"(?s)1\. adapter.lora_alpha.*2\. train.learning_rate.*3\. train.seed"):
        train(path, resume=True)
    with caplog.at_level(logging.WARNING):
        assert train(path, resume="force").steps == STEPS
    assert "as forced" in caplog.text and "0.02 now" in caplog.text
    assert [step for step, _ in losses(job)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"r": 8}}, "adapter.r: 4 in the checkpoint, 8 now.*trained weights"),
        ({"adapter": {"target_modules": ["q_proj"]}}, "adapter.target_modules.*trained weights"),
        ({"train": {"optim": "sgd"}}, "train.optim.*sgd now"),
    ],
    ids=["rank", "targets", "optimizer"],
)
def test_what_does_not_fit_cannot_be_forced(job: Path, changes: dict[str, Any], message: str) -> None:
    for resume in (True, "force"):
        with pytest.raises(TrainingError, match=f"(?s){message}.*cannot be forced"):
            train(job_in(job, **changes), resume=resume)


def test_other_data_in_the_same_file_are_seen(job: Path) -> None:
    for rows in (chats(changed=11), chats(17), chats()[::-1]):
        (job / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(TrainingError, match="data.content"):
            train(job / "job.yaml", resume=True)


def test_another_model_in_the_same_folder_is_seen(job: Path) -> None:
    shutil.rmtree(job / "base")
    save_tiny(job / "base", amplify=2.0)
    with pytest.raises(TrainingError, match="model.frozen weights"):
        train(job / "job.yaml", resume=True)


def test_a_folder_that_moved_or_was_touched_is_the_same_run(job: Path, tmp_path: Path) -> None:
    """Names, sizes of logs, evaluation and how data are loaded do not change a run; neither does another place."""
    job.rename(tmp_path / "moved")
    path = job_in(tmp_path / "moved", train={"logging_steps": 2, "save_total_limit": 2, "run_name": "other"})
    (tmp_path / "moved/rows.jsonl").touch()
    assert train(path, resume=True).steps == STEPS
    assert sorted(p.name for p in (tmp_path / "moved/out").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_a_checkpoint_without_a_fingerprint_needs_force(job: Path) -> None:
    for step in (2, 4):
        without_manifest(job / f"out/checkpoint-{step}")
    with pytest.raises(TrainingError, match="(?s)no fingerprint.*--resume force.*new folder"):
        train(job / "job.yaml", resume=True)
    assert train(job / "job.yaml", resume="force").steps == STEPS


def test_shapes_of_a_checkpoint_without_a_fingerprint_are_compared(job: Path) -> None:
    shutil.rmtree(job / "out/checkpoint-2")
    path = without_manifest(job / "out/checkpoint-4") / "adapter_model.safetensors"
    with pytest.raises(CheckpointError, match="lora_A.*is .4, .*and .8, "):
        train(job_in(job, adapter={"r": 8}), resume="force")
    save_file({"other.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="none of the weights"):
        train(job_in(job), resume="force")


def test_a_finished_run_says_so_and_does_nothing(done: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "out").rglob("*")}
    result = train(done / "job.yaml", resume=True)
    assert result.already and result.steps == STEPS and result.counts.examples == 16
    assert {path: path.stat().st_mtime_ns for path in (done / "out").rglob("*")} == before


def test_a_run_that_was_killed_before_it_saved_its_model_saves_it(done: Path, finished: Path) -> None:
    shutil.rmtree(done / "out/model")
    (done / "out/summary.json").unlink()
    rows = losses(done)
    result = train(done / "job.yaml", resume=True)
    assert not result.already and result.steps == STEPS and losses(done) == rows
    ours, theirs = (load_file(folder / "out/model/adapter_model.safetensors") for folder in (done, finished))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((done / "out/summary.json").read_text())["steps"] == STEPS


def test_a_finished_run_with_other_settings_is_refused(done: Path) -> None:
    with pytest.raises(TrainingError, match="train.learning_rate"):
        train(job_in(done, train={"learning_rate": 0.5}), resume=True)


def test_fewer_steps_than_were_trained_train_nothing(job: Path) -> None:
    path = job_in(job, train={"lr_scheduler_type": "constant"})
    with pytest.raises(TrainingError, match="schedule.type"):
        train(path, resume=True)
    result = train(job_in(job, train={**TRAIN, "max_steps": 3}), resume="force")
    assert result.steps == 4 and len(losses(job)) == 4


def test_epochs_are_not_exceeded(tmp_path: Path) -> None:
    epochs = {"max_steps": -1, "num_train_epochs": 1.5, "save_steps": 4, "lr_scheduler_type": "constant"}
    path = job_in(tmp_path / "job", train=epochs)
    assert train(path).steps == 12
    (tmp_path / "job/out/summary.json").unlink()
    assert train(path, resume=True).steps == 12
    assert train(job_in(tmp_path / "job", train={**epochs, "num_train_epochs": 2}), resume=True).steps == 16


def test_a_new_run_is_not_mixed_with_an_older_one(job: Path) -> None:
    with pytest.raises(TrainingError, match=r"earlier run \(steps 2, 4\).*--resume.*output_dir"):
        train(job / "job.yaml")
    (job / "file").write_text("")
    with pytest.raises(TrainingError, match="is a file"):
        train(job_in(job, train={"output_dir": "file"}))


def test_two_processes_do_not_train_into_one_folder(job: Path) -> None:
    with sole_writer(job / "out"), pytest.raises(TrainingError, match="another process trains"):
        train(job / "job.yaml", resume=True)
    assert not list((job / "out").glob("*.lock"))


def test_metrics_that_a_kill_tore_are_written_again(job: Path, finished: Path) -> None:
    with (job / "out/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(job / "job.yaml", resume=True)
    assert losses(job) == losses(finished)


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path: Path) -> None:
    best = {
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "learning_rate": 1.0,
    }
    path = job_in(tmp_path / "job", train=best, data={"eval_split": "train[:4]"})
    train(path)
    out = tmp_path / "job/out"
    state = json.loads((last_whole(out).folder / "trainer_state.json").read_text())
    kept = Path(state["best_model_checkpoint"])
    assert kept.parent == out and isinstance(examine(kept), Checkpoint)
    ours, theirs = load_file(out / "model/adapter_model.safetensors"), load_file(kept / "adapter_model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before = ours
    (out / "summary.json").unlink()
    train(path, resume=True)
    after = load_file(out / "model/adapter_model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_trl_trainers_in_python(job: Path) -> None:
    """`resumable` around a trainer of one's own: damaged, other and finished checkpoints raise, the rest is as in a job."""
    from training_kit import plain_settings, rows, tiny_tokenizer
    from trl import SFTConfig, SFTTrainer

    from hasten.training import resumable

    def trainer(**changes: Any) -> Any:
        model, _ = FastLanguageModel.from_pretrained(str(job / "base"), 64, load_in_4bit=False)
        model = FastLanguageModel.get_peft_model(model, r=4)
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **changes}
        args = SFTConfig(**plain_settings(job / "own", **settings), max_length=64)
        return resumable(SFTTrainer)(model=model, args=args, train_dataset=rows(24), processing_class=tiny_tokenizer())

    first = trainer()
    assert type(first).__name__ == "SFTTrainer" and first.train().global_step == 4
    with pytest.raises(TrainingError, match="nothing is left"):
        trainer().train(resume_from_checkpoint=True)
    (job / "own/checkpoint-4/optimizer.safetensors").unlink()
    with pytest.raises(TrainingError, match="optimizer"):
        trainer().train(resume_from_checkpoint=str(job / "own/checkpoint-4"))
    with pytest.raises(TrainingError, match="train.learning_rate"):
        trainer(learning_rate=0.5).train(resume_from_checkpoint=True)
    again = trainer()
    assert again.train(resume_from_checkpoint=True).global_step == 4
    whole = {name: p for name, p in first.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, whole[name]) for name, p in again.model.named_parameters() if p.requires_grad)


KINDS: dict[str, dict[str, Any]] = {
    "full": {"model": {"full_finetuning": True}, "adapter": None, "train": {"optim": "adamw_bf16_stochastic"}},
    "embedding, NF4": {"model": {"load_in_4bit": True}, "adapter": {"target_modules": ["q_proj", "embed_tokens"]}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_ways_of_training_resume_and_end_alike(tmp_path: Path, kind: str) -> None:
    whole, broken = (job_in(tmp_path / name, **KINDS[kind]) for name in ("whole", "broken"))
    train(whole)
    with pytest.raises(Stopped):
        train(broken, stop_at=5)
    assert last_whole(broken.parent / "out").step == 4
    train(broken, resume=True)
    assert losses(broken.parent) == losses(whole.parent)
    name = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    expected = load_file(whole.parent / "out/model" / name)

    def same() -> bool:
        found = load_file(broken.parent / "out/model" / name)
        return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)

    assert same()
    shutil.rmtree(broken.parent / "out/model")
    assert not train(broken, resume=True).already and same()  # from the last checkpoint, without training
