"""Job files: values mean what their keys take or are refused, all problems in one error, before anything slow is imported."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hasten.errors import OptionError
from hasten.schema.job_file import read_sections
from hasten.schema.yaml_file import MAX_BYTES
from hasten.training.config import read_job

HEAD = {"model": "model_name: base", "data": "path: rows.jsonl"}


def write(folder: Path, **sections: str) -> Path:
    """sections: the lines of each, in flow style without braces; those of HEAD are added to."""
    lines = {**HEAD, **{name: f"{HEAD[name]}, {text}" if name in HEAD else text for name, text in sections.items()}}
    path = folder / "job.yaml"
    path.write_text("".join(f"{name}: {{{text}}}\n" for name, text in lines.items()))
    return path


def problems(path: Path) -> list[str]:
    with pytest.raises(OptionError) as caught:
        read_sections(path)
    return caught.value.problems


@pytest.mark.parametrize(
    ("section", "text", "key", "value"),
    [
        ("train", "run_name: 007", "run_name", "007"),
        ("train", "run_name: '007'", "run_name", "007"),
        ("train", "run_name: 1:30", "run_name", "1:30"),
        ("train", "run_name: 0x1F", "run_name", "0x1F"),
        ("train", "run_name: no", "run_name", "no"),
        ("train", "run_name: 1e5", "run_name", "1e5"),
        ("train", "run_name: .inf", "run_name", ".inf"),
        ("train", "run_name: null", "run_name", None),
        ("train", "output_dir: 2026_11_25", "output_dir", "2026_11_25"),
        ("train", "output_dir: 2026-11-25", "output_dir", "2026-11-25"),
        ("train", "output_dir: 2026-11-25 10:00:00", "output_dir", "2026-11-25 10:00:00"),
        ("train", "output_dir: 42", "output_dir", "42"),
        ("train", "save_strategy: no", "save_strategy", "no"),
        ("train", "max_steps: 1e0", "max_steps", 1),
        ("train", "max_steps: 1e3", "max_steps", 1000),
        ("train", "max_steps: 1_000", "max_steps", 1000),
        ("train", "max_steps: -1", "max_steps", -1),
        ("train", "save_steps: 500", "save_steps", 500),
        ("train", "save_steps: .1", "save_steps", 0.1),
        ("train", "learning_rate: 1e-4", "learning_rate", 1e-4),
        ("train", "learning_rate: +2.E-4", "learning_rate", 2e-4),
        ("train", "learning_rate: 1", "learning_rate", 1),
        ("train", "bf16: yes", "bf16", True),
        ("train", "bf16: Off", "bf16", False),
        ("train", "packing: TRUE", "packing", True),
        ("train", "lr_scheduler_kwargs: {min_lr: 1e-5, a: true}", "lr_scheduler_kwargs", {"min_lr": 1e-5, "a": True}),
        ("train", "report_to: [none]", "report_to", ["none"]),
        ("train", "report_to: none", "report_to", "none"),
        ("model", "revision: 5e10", "revision", "5e10"),
        ("model", "revision: 0012345", "revision", "0012345"),
        ("model", "load_in_4bit: no", "load_in_4bit", False),
        ("model", "dtype: torch.float16", "dtype", "float16"),
        ("model", "max_memory: {0: 10GiB, cpu: 20GiB}", "max_memory", {0: "10GiB", "cpu": "20GiB"}),
        ("model", "unsloth_tiled_mlp: auto", "unsloth_tiled_mlp", "auto"),
        ("model", "memory_budget: 8.2GiB", "memory_budget", "8.2GiB"),
        ("model", "rope_scaling: {rope_type: linear, factor: 2.0}", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("adapter", "target_modules: [q_proj, on]", "target_modules", ["q_proj", "on"]),
        ("adapter", "target_modules: all-linear", "target_modules", "all-linear"),
        ("adapter", "layers_to_transform: [0, 1]", "layers_to_transform", [0, 1]),
        ("adapter", "rank_pattern: {q_proj: 4}", "rank_pattern", {"q_proj": 4}),
        ("adapter", "init_lora_weights: pissa_niter_4", "init_lora_weights", "pissa_niter_4"),
    ],
)  # fmt: skip
def test_the_meant_value(tmp_path: Path, section: str, text: str, key: str, value: Any) -> None:
    found = read_sections(write(tmp_path, **{section: text}))[section][key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("section", "text", "words"),
    [
        ("model", 'load_in_4bit: "false"', "model.load_in_4bit 'false' quotes true|or|false leave"),
        ("model", "load_in_4bit: 0", "model.load_in_4bit integer true|or|false"),
        ("model", "load_in_4bit: [true]", "model.load_in_4bit list"),
        ("model", 'use_gradient_checkpointing: "true"', "use_gradient_checkpointing quotes"),
        ("model", "use_gradient_checkpointing: offlaod", "'offlaod' offload"),
        ("model", "max_seq_length: '64'", "max_seq_length quotes integer"),
        ("model", "max_seq_length: 64.5", "max_seq_length integer"),
        ("model", "max_seq_length: -1", "max_seq_length -1 at|least|1"),
        ("model", "max_seq_length: true", "max_seq_length truth|value integer"),
        ("model", "max_seq_length: {a: 1}", "max_seq_length mapping integer"),
        ("model", "revision: None", "revision 'None' null"),
        ("model", "revision: [a]", "revision list text"),
        ("model", "force_download: 'no'", "force_download quotes"),
        ("model", "device_map: {a: off}", "device_map.a two|ways"),
        ("model", "dtype: int8", "dtype 'int8' bfloat16"),
        ("model", "rope_scaling: linear", "rope_scaling 'linear' mapping"),
        ("adapter", "r: 0", "adapter.r 0 at|least|1"),
        ("adapter", "r: 0o17", "adapter.r decimal"),
        ("adapter", "lora_alpha: 007", "lora_alpha 007 decimal"),
        ("adapter", "lora_dropout: .nan", "lora_dropout .nan finite"),
        ("adapter", "lora_dropout: 1.5", "lora_dropout 1.5 below|1"),
        ("adapter", "modules_to_save: lm_head", "modules_to_save 'lm_head' [lm_head]"),
        ("adapter", "target_modules: [[q_proj]]", "target_modules[0] list text"),
        ("adapter", "target_modules: [1e400]", ""),
        ("adapter", "bias: al", "adapter.bias 'al' none,|all"),
        ("adapter", "use_rslora: 'yes'", "use_rslora quotes"),
        ("data", "split: ", "data.split null text"),
        ("data", "too_long: [drop]", "too_long list truncate"),
        ("train", "seed: 1:30", "train.seed 1:30 decimal"),
        ("train", "seed: 2026_11_25", "train.seed 2026_11_25 decimal"),
        ("train", "seed: -1", "train.seed -1 at|least|0"),
        ("train", "seed: 2026-11-25", "train.seed 2026-11-25 integer"),
        ("train", "max_steps: 0", "max_steps 0 -1"),
        ("train", "max_steps: 1.5", "max_steps 1.5 integer"),
        ("train", "learning_rate: -.inf", "learning_rate finite"),
        ("train", "learning_rate: nan", "learning_rate finite"),
        ("train", "learning_rate: 1e999", "learning_rate"),
        ("train", "learning_rate: -1e-4", "learning_rate at|least|0"),
        ("train", "learning_rate: ~", "learning_rate null"),
        ("train", "bf16: 'true'", "bf16 quotes"),
        ("train", "packing: maybe", "packing 'maybe'"),
        ("train", "seed: 4294967296", "train.seed below|2^32"),
        ("train", f"max_steps: {'9' * 5000}", "train.max_steps at|most|18|digits"),
        ("train", "lr_scheduler_kwargs: {min_lr: '1e-5'}", "min_lr '1e-5' leave|out|the|quotes"),
        ("train", "accelerator_config: {split_batches: 'false'}", "split_batches 'false' leave|out|the|quotes"),
        ("train", "lr_scheduler_kwargs: {min_lr: 1:30}", "min_lr two|ways"),
        ("train", "adam_beta2: 1.0", "adam_beta2 below|1"),
        ("train", "output_dir: ''", "output_dir empty"),
        ("save", "folder: [a, b]", "save.folder list"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_named_with_what_is_expected(
    tmp_path: Path, section: str, text: str, words: str
) -> None:
    if not words:  # text where text is taken, however much it looks like a number
        assert read_sections(write(tmp_path, **{section: text}))
        return
    found = problems(write(tmp_path, **{section: text}))
    assert len(found) == 1
    for word in words.split():
        assert word.replace("|", " ") in found[0], found[0]


@pytest.mark.parametrize(
    ("section", "name", "meant"),
    [
        ("adapter", "rank", "r"), ("adapter", "lora_rank", "r"), ("adapter", "lora_r", "r"), ("adapter", "alpha", "lora_alpha"),
        ("adapter", "lora_target", "target_modules"), ("adapter", "dropout", "lora_dropout"),
        ("train", "lr", "learning_rate"), ("train", "epochs", "num_train_epochs"), ("train", "num_epochs", "num_train_epochs"),
        ("train", "batch_size", "per_device_train_batch_size"), ("train", "micro_batch_size", "per_device_train_batch_size"),
        ("train", "lr_scheduler", "lr_scheduler_type"), ("train", "optimizer", "optim"), ("train", "sample_packing", "packing"),
        ("train", "warmup_ratio", "warmup_steps"), ("train", "learnin_rate", "learning_rate"),
        ("train", "cutoff_len", "model.max_seq_length"), ("train", "lora_r", "adapter.r"), ("train", "r", "section 'adapter'"),
        ("model", "base_model", "model_name"), ("model", "model_name_or_path", "model_name"), ("model", "seq_len", "max_seq_length"),
        ("model", "sequence_len", "max_seq_length"), ("model", "cutoff_len", "max_seq_length"), ("model", "torch_dtype", "dtype"),
        ("model", "learning_rate", "section 'train'"),
        ("data", "dataset", "path"), ("data", "val_set_size", "eval_split"), ("save", "save_method", "method"),
    ],
)  # fmt: skip
def test_names_of_other_libraries(tmp_path: Path, section: str, name: str, meant: str) -> None:
    (found,) = problems(write(tmp_path, **{section: f"{name}: 1"}))
    assert f"{section}: {name!r}" in found and meant in found.split(repr(name))[1]


def test_a_flat_file_of_another_library_says_where_each_key_belongs(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("base_model: a\nlora_r: 8\nlearning_rate: 1e-4\nmicro_batch_size: 2\nwhatever: 3\n")
    found = problems(path)
    for words in (
        "'model', as model_name",
        "'adapter', as r",
        "'train', as learning_rate",
        "per_device_train_batch_size",
    ):
        assert any(words in problem for problem in found), words
    assert any("'whatever'" in problem and "known: model, adapter" in problem for problem in found)
    assert any("section 'model' is missing" in problem for problem in found) and len(found) == 7


def test_every_problem_is_in_one_error(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "model: {model_name: a, load_in_4bit: 'false', max_seq_length: .nan, max_seq_length: 3}\n"
        "adapter: {rank: 8, lora_alpha: [1], use_dora: 1}\n"
        "data: {split: null}\n"
        "train: {lr: 3, seed: '1', lr_scheduler_kwargs: {a: {b: no}}}\n"
        "train: {epochs: 1}\n"
        "extra: 3\n"
    )
    found = "\n".join(problems(path))
    for word in (
        "load_in_4bit", "'max_seq_length' stands twice", "'rank'", "lora_alpha", "use_dora", "data.path is missing", "data.split",
        "'epochs'", "'train' stands twice", "'extra'",
    ):  # fmt: skip
        assert word in found, word


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 10000 values"),
        ("a: &a [*a]\n", "holds itself"),
        ("model: *nothing\n", "is not defined"),
        ("[" * 5000, "nested more than"),
        ("{a: " * 5000, "nested more than"),
        ("- " * 3000, "nested more than"),
        ("a: " + "b" * MAX_BYTES, "more than 256 KiB"),
        ("model: !!python/object/apply:os.system [ls]\n", "tag"),
        ("model: !!python/name:os.system\n", "tag"),
        ("model: !mine {a: 1}\n", "tag"),
        ("model: {seed: !!int '3'}\n", "tag"),
        ("a: 1\n---\nb: 2\n", "second document"),
        ("? [a, b]\n: 1\n", "a key is a list"),
        ("<<: 3\n", "merges mappings only"),
        ("a: 1\n  b: 2\n", "not YAML"),
        ("a: \x00\n", "not YAML"),
        ("a: b: c\n", "not YAML"),
        ("@", "not YAML"),
    ],
)  # fmt: skip
def test_hostile_files_end_in_one_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    assert message in problems(path)[0]


def test_places_that_are_no_files(tmp_path: Path) -> None:
    assert "cannot be read" in problems(tmp_path)[0] and "cannot be read" in problems(tmp_path / "none")[0]
    (tmp_path / "latin").write_bytes(b"model: \xff\xfe")
    assert "not YAML" in problems(tmp_path / "latin")[0]


def test_anchors_aliases_and_merges_are_yaml_s_own(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "model: &m {model_name: &name base, max_seq_length: 64}\n"
        "data: {path: *name}\n"
        "train: {<<: {seed: 1, max_steps: 2}, seed: 3}\n"
    )
    found = read_sections(path)
    assert found["data"]["path"] == "base" and found["train"] == {"seed": 3, "max_steps": 2}


def test_values_that_only_the_calls_know_are_refused_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="(?s)load_in_4bit, load_in_8bit.*layers_to_transform|layers"):
        read_job(
            write(
                tmp_path, model="load_in_4bit: true, load_in_8bit: true", adapter="layers_to_transform: -1, bias: all"
            )
        )


def test_a_bad_file_is_refused_before_slow_imports(tmp_path: Path) -> None:
    path = write(tmp_path, train="lr: 1", model="load_in_4bit: 'false'")
    code = (
        "import sys\nfrom hasten.cli import app\n"
        f"try:\n    app(['train', {str(path)!r}])\n"
        "except SystemExit as end:\n"
        "    slow = {'torch', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules)\n"
        "    print(end.code, slow or 'light')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["2", "light"], done.stderr
    assert "learning_rate" in done.stderr and "load_in_4bit" in done.stderr


def test_the_source_says_what_the_classes_have() -> None:
    """Fields that are read from source are those of the imported dataclasses, whatever the installed versions."""
    import dataclasses

    from peft import LoraConfig
    from trl import SFTConfig

    from hasten.options import AdapterOptions, DataOptions, LoadOptions, SaveOptions
    from hasten.schema import fields_of

    for module, name, kind in (
        ("trl", "SFTConfig", SFTConfig),
        ("peft", "LoraConfig", LoraConfig),
        ("hasten.options.fields", "LoadFields", LoadOptions),
        ("hasten.options.fields", "AdapterFields", AdapterOptions),
        ("hasten.options.data", "DataOptions", DataOptions),
        ("hasten.options.data", "SaveOptions", SaveOptions),
    ):
        assert set(fields_of(module, name)) == {f.name for f in dataclasses.fields(kind) if f.init}, name


@pytest.mark.parametrize("empty", ["", "~", "null", "{}"])
def test_an_empty_section_has_the_defaults(tmp_path: Path, empty: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"model: {{model_name: base}}\ndata: {{path: rows.jsonl}}\nadapter: {empty}\ntrain: {empty}\n")
    assert read_sections(path)["adapter"] == {} == read_sections(path)["train"]
    path.write_text(f"model: {empty}\ndata: {empty}\n")
    assert [problem.split(" is missing")[0] for problem in problems(path)] == ["model.model_name", "data.path"]
