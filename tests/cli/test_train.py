"""`hasten train`, through the library and through the command: what it writes, counts, refuses, resumes and aborts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_kit import CHATS, read_metrics, write_job, write_rows
from safetensors.torch import load_file

from hasten import FastLanguageModel
from hasten.cli.arguments import save_methods
from hasten.errors import DatasetError, HastenError, OptionError, TrainingError
from hasten.export import exporters
from hasten.training.config import read_job
from hasten.training.job import Finished, run
from hasten.training.state_files import read_state


def train(path: Path, resume: bool = False) -> Finished:
    return run(read_job(path), FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model, resume=resume)


def test_a_run_leaves_metrics_curve_summary_and_a_model_that_loads(tmp_path: Path) -> None:
    done = train(write_job(tmp_path, data={"eval_split": "train[:4]"}, model={"load_in_4bit": True}))
    rows = read_metrics(tmp_path / "out/metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["peak_memory_bytes"] > 0 for row in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["eta_seconds"] == 0 and steps[0]["eta_seconds"] > 0
    assert any("eval_loss" in row for row in rows)
    # Four steps of four rows are the whole data set, so the sums must be what counting the rows gave.
    assert sum(row["tokens"] for row in steps) == steps[-1]["total_tokens"] == done.counts.tokens
    assert sum(row["learned_tokens"] for row in steps) == done.counts.labels
    for row in steps:
        assert row["masked_percent"] == round(100 * (1 - row["learned_tokens"] / row["tokens"]), 2)
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["steps"] == 4 and summary["save_method"] == "lora" and summary["dataset"]["examples"] == 16
    reloaded, _ = FastLanguageModel.from_pretrained(str(done.saved))
    trained = {n: p for n, p in done.model.named_parameters() if "lora_B" in n}
    assert trained and all(torch.equal(p, trained[n]) for n, p in reloaded.named_parameters() if "lora_B" in n)
    assert any(p.any() for p in trained.values())


def test_counted_tokens_are_the_rows_own(tmp_path: Path) -> None:
    """Against a count by hand: BOS, role marks, contents byte by byte and end marks; only answers and their end learned."""
    done = train(write_job(tmp_path))
    contents = [[len(m["content"]) for m in chat["messages"]] for chat in CHATS]
    assert done.counts.tokens == sum(1 + (1 + user + 1) + (1 + answer + 1) for user, answer in contents)
    assert done.counts.labels == sum(answer + 1 for _, answer in contents)


@pytest.mark.parametrize("policy", ["truncate", "drop", "error"])
def test_rows_that_are_too_long(tmp_path: Path, policy: str) -> None:
    long = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 100}]}
    write_rows(tmp_path / "rows.jsonl", [*CHATS, long, long])
    path = write_job(tmp_path, data={"too_long": policy})
    if policy == "error":
        with pytest.raises(DatasetError, match="2 of 18 examples are longer than max_seq_length=64"):
            train(path)
        assert not (tmp_path / "out/metrics.jsonl").exists()
        return
    done = train(path)
    assert done.counts.truncated == 2
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["dropped_too_long"] == done.dropped == (2 if policy == "drop" else 0)
    assert summary["dataset"]["lost"] == done.counts.lost == 2 * (106 - 64)


@pytest.mark.parametrize("batching", ["padded", "packing", "padding_free"])
def test_dropping_leaves_only_short_rows_to_the_trainer(tmp_path: Path, batching: str) -> None:
    long = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 100}]}
    write_rows(tmp_path / "rows.jsonl", [*CHATS, long])
    flags = {} if batching == "padded" else {batching: True}
    job = read_job(
        write_job(tmp_path, train={**flags, "max_steps": -1, "num_train_epochs": 1}, data={"too_long": "drop"})
    )
    done = run(job, FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model)
    assert done.dropped == 1
    short = [len(chat["messages"][0]["content"]) + len(chat["messages"][1]["content"]) + 5 for chat in CHATS]
    assert read_metrics(tmp_path / "out/metrics.jsonl")[-1]["total_tokens"] == sum(short)


def test_padding_free_rows_cannot_be_truncated(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "a" * 100}] * 4)
    with pytest.raises(DatasetError, match="4 of 4 examples are longer than max_seq_length=64"):
        train(write_job(tmp_path, train={"assistant_only_loss": False, "padding_free": True}))


@pytest.mark.parametrize(
    ("rows", "sections", "message"),
    [
        ([], {}, "empty"),
        (
            [{"prompt": "p" * 80, "completion": "c"}] * 4,
            {"train": {"assistant_only_loss": False}},
            "no label|no row|left",
        ),
        ([{"question": "a", "answer": "b"}], {}, "has the columns answer, question|has the columns question, answer"),
        ([{"text": "a"}, {"text": None}], {}, "1 examples have an empty 'text'"),
        (CHATS, {"data": {"split": "test"}}, "cannot be read"),
        (CHATS, {"data": {"path": "missing.jsonl"}}, "missing.jsonl"),
    ],
    ids=["empty", "all masked", "unknown columns", "hole", "unknown split", "missing file"],
)
def test_bad_data_raise_before_step_one(
    tmp_path: Path, rows: list[Any], sections: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises((DatasetError, OptionError), match=message):
        train(write_job(tmp_path, **sections))
    assert not (tmp_path / "out/metrics.jsonl").exists()


@pytest.mark.parametrize("kind", ["text", "pair", "csv", "parquet", "saved"])
def test_every_kind_of_data(tmp_path: Path, kind: str) -> None:
    import datasets

    texts = [{"body": f"row {i}", "other": i} for i in range(8)]
    plain = {"train": {"assistant_only_loss": False, "max_steps": 1}}
    if kind == "pair":
        write_rows(tmp_path / "rows.jsonl", [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(8)])
        sections: dict[str, Any] = {}
    else:
        table = datasets.Dataset.from_list(texts)
        name = {"text": "rows.jsonl", "csv": "t.csv", "parquet": "t.parquet", "saved": "t"}[kind]
        save = {"text": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet, "saved": table.save_to_disk}
        save[kind](tmp_path / name)
        sections = {"data": {"path": name, "text_field": "body"}}
    done = train(write_job(tmp_path, **plain, **sections))
    if kind == "pair":
        assert done.counts.labels == 8 * 3  # two bytes of the completion and the end
    else:
        assert done.counts.tokens == 8 * (1 + len("row 0") + 1)


def test_full_finetuning_saves_the_whole_model(tmp_path: Path) -> None:
    path = write_job(tmp_path, model={"full_finetuning": True})
    text = path.read_text()
    path.write_text("\n".join(line for line in text.splitlines() if line not in ("adapter:", "  r: 4")))
    done = train(path)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", done.saved))
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])


def test_resume_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for folder in (whole, parted):
        folder.mkdir()
    often = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    straight = train(write_job(whole, train=often))
    train(write_job(parted, train={**often, "max_steps": 3}))
    resumed = train(write_job(parted, train=often), resume=True)
    rows, expected = (read_metrics(folder / "out/metrics.jsonl") for folder in (parted, whole))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert rows[-1]["total_tokens"] == expected[-1]["total_tokens"]
    weights = dict(straight.model.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in resumed.model.named_parameters())


def test_resume_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no checkpoint"):
        train(write_job(tmp_path), resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(tmp_path: Path) -> None:
    def adapt(model: Any, **options: Any) -> Any:
        """As get_peft_model, with a model whose third training batch goes wrong."""
        peft = FastLanguageModel.get_peft_model(model, **options)
        calls = []

        def poison(module: Any, args: Any, output: Any) -> Any:
            calls.append(1)
            return output * (math.nan if len(calls) == 3 else 1.0)

        model.model.embed_tokens.register_forward_hook(poison)
        return peft

    job = read_job(write_job(tmp_path, model={"use_gradient_checkpointing": False}))
    assert job.adapter is not None and job.adapter["use_gradient_checkpointing"] is False
    with pytest.raises(TrainingError, match="step 3: the gradient is not finite; the last good step is 2"):
        run(job, FastLanguageModel.from_pretrained, adapt)
    assert [row["step"] for row in read_metrics(tmp_path / "out/metrics.jsonl")] == [1, 2]
    assert (tmp_path / "out/loss.png").exists() and not (tmp_path / "out/model").exists()


def test_every_unknown_name_of_a_file_is_in_one_error(tmp_path: Path) -> None:
    path = write_job(
        tmp_path,
        model={"load_in_4bits": True, "dtype": "bf17"},
        adapter={"lora_alhpa": 3},
        data={"to_long": "drop", "too_long": "cut"},
        train={"learning_rat": 1, "max_length": 12, "gradient_checkpointing": True},
        save={"methud": "lora"},
    )
    with pytest.raises(OptionError) as caught:
        read_job(path)
    said = "\n".join(caught.value.problems)
    expected = (
        "load_in_4bit lora_alpha too_long learning_rate method model.max_seq_length 'cut' bf17 use_gradient_check"
    )
    for word in expected.split():
        assert word in said, word
    assert len(caught.value.problems) == 9


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "model: [1, 2", "model: {model_name: base}\n", "", "model: 3\ndata: 4\n"]
)
def test_files_that_are_no_jobs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(OptionError):
        read_job(path)
    with pytest.raises(OptionError, match="cannot be read"):
        read_job(tmp_path / "none.yaml")


def test_settings_that_trl_refuses_are_typed(tmp_path: Path) -> None:
    with pytest.raises(HastenError, match="eval_strategy"):
        train(write_job(tmp_path, train={"eval_strategy": "steps"}))
    with pytest.raises(OptionError, match="refuses"):
        train(write_job(tmp_path, train={"lr_scheduler_type": "zigzag"}))


def test_the_example_trains_a_tiny_model_on_tiny_chats(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples/qlora_sft.yaml"
    write_job(tmp_path)
    write_rows(tmp_path / "chats.jsonl", CHATS * 2)
    text = example.read_text().replace("Qwen/Qwen3-0.6B", "base").replace("max_seq_length: 2048", "max_seq_length: 64")
    (tmp_path / "example.yaml").write_text(text)
    done = train(tmp_path / "example.yaml")
    assert done.saved == tmp_path / "runs/qlora_sft/model" and done.steps == 4
    rows = read_metrics(tmp_path / "runs/qlora_sft/metrics.jsonl")
    assert [row["learning_rate"] for row in rows if "loss" in row][0] <= 2e-4
    assert any("eval_loss" in row for row in rows)


def test_sparkline_has_the_shape_of_its_values() -> None:
    from hasten.training.curve import sparkline

    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([2.0] * 5) == "▁▁▁▁▁" and sparkline([]) == ""
    assert len(sparkline(list(range(1000)), width=40)) == 40


def test_metrics_of_steps_that_will_run_again_are_dropped(tmp_path: Path) -> None:
    from hasten.training.metrics import MetricsFile

    file = MetricsFile(tmp_path / "deep/metrics.jsonl")
    assert file.rewind(0) == []
    for step in (1, 2, 3):
        file.add({"step": step, "loss": float(step)})
    assert [row["step"] for row in file.rewind(2)] == [1, 2] == [row["step"] for row in file.rows()]
    assert file.rewind(0) == [] == file.rows()


def test_ways_of_saving_are_checked_before_training(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="one of merged_16bit, merged_4bit, lora"):
        read_job(write_job(tmp_path, save={"method": "gguf"}))
    path = write_job(tmp_path, save={"method": "lora"}, model={"full_finetuning": True})
    with pytest.raises(OptionError, match="full fine-tuning has none"):
        read_job(path)
    assert set(exporters.names()) == set(save_methods())


def test_full_finetuning_in_bf16_with_stochastic_rounding(tmp_path: Path) -> None:
    """What only a job file names: the optimizer, and how it was made from the job's own settings."""
    model = {"full_finetuning": True, "dtype": "bfloat16", "load_in_4bit": False}
    how = {"optim": "adamw_bf16_stochastic", "save_strategy": "steps", "save_steps": 4, "seed": 9}
    path = write_job(tmp_path, model=model, train=how)
    sections = yaml.safe_load(path.read_text())
    del sections["adapter"]
    path.write_text(yaml.safe_dump(sections))
    train(path)
    state = read_state(tmp_path / "out/checkpoint-4/optimizer")
    assert {group["seed"] for group in state["param_groups"]} == {9}
    assert {moment["exp_avg"].dtype for moment in state["state"].values()} == {torch.bfloat16}
