"""Guarantees of the surroundings: imports, side effects, the network, unsafe files, versions, the doctor."""

import ast
import dataclasses
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from guarantee_kit import IDS, adapted, as_json, chats, load, logits, stock, trainer
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

from hasten import doctor
from hasten.cli import app
from hasten.errors import CheckpointError, HastenError

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "hasten").rglob("*.py"))
OPTIONAL = ("triton", "xformers", "bitsandbytes", "vllm", "trl", "datasets", "matplotlib", "torchao")

BARE = """
import json, os, socket, sys, warnings
warnings.simplefilter("ignore")
connects = []
socket.socket.connect = lambda self, address: connects.append(str(address)) or (_ for _ in ()).throw(OSError("offline"))
import torch, transformers, peft
torch.set_num_threads(1)  # threads do not survive a fork
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, LlamaForCausalLM, Trainer
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
folder, out = sys.argv[1:]
def members():
    owners = (LlamaForCausalLM, Trainer, GenerationMixin, peft.PeftModel, torch.nn.Module, torch.nn.Linear, torch.utils.checkpoint, torch.nn.functional)
    return {f"{o.__name__}.{n}": id(v) for o in owners for n, v in vars(o).items() if n not in ("_compiled_call_impl",)}
ids = torch.arange(6, 30)[None]
def plain():
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
before, environment, first = members(), dict(os.environ), plain()
found = {"without": {}}
for package in json.loads(os.environ["BLOCKED"]):
    child = os.fork()
    if child == 0:
        for name in [n for n in sys.modules if n.split(".")[0] == package]:
            del sys.modules[name]
        sys.modules[package] = None
        from hasten import FastLanguageModel
        model, _ = FastLanguageModel.from_pretrained(folder, 64, torch.float32, load_in_4bit=False, full_finetuning=True)
        ok = torch.equal(model.eval()(ids).logits, first)
        model.train()(ids, labels=ids).loss.backward()
        os._exit(0 if ok else 3)
    found["without"][package] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
from hasten import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(folder, 64, torch.float32, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=4)
model.train()(ids, labels=ids).loss.backward()
model.for_inference().generate(ids, max_new_tokens=2, do_sample=False)
model.save_pretrained_merged(out, tokenizer)
after = members()
found["changed"] = sorted(n for n in before if after.get(n) != before[n])
found["environment"] = sorted(set(os.environ.items()) ^ set(environment.items()))
found["stock is stock"] = bool(torch.equal(plain(), first)) and type(AutoModelForCausalLM.from_pretrained(folder)).__module__.startswith("transformers.")
found["tokenizer"] = AutoTokenizer.from_pretrained(folder).padding_side
found["connects"] = connects
found["cwd"] = os.listdir(".")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def bare(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process finds before and after using hasten, and forks of it without each optional package."""
    out, work = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("work")
    environment = {
        **os.environ,
        "BLOCKED": json.dumps(OPTIONAL),
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", BARE, str(plain), str(out / "merged")]
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_r27_each_optional_package_may_be_missing(bare: dict[str, Any]) -> None:
    """hasten imports, loads and trains without any one of its optional packages, and the doctor names versions that do not fit."""
    assert bare["without"] == dict.fromkeys(OPTIONAL, 0)
    machine = dataclasses.replace(doctor.look(), installed={"torch": "2.3.0"})
    (found,) = [f for f in doctor.problems(doctor.examine(machine)) if f.subject == "torch"]
    assert "2.3.0, needs >=2.11" in found.found and "pip install -U" in found.fix


def test_r27_the_oldest_and_the_newest_versions_are_pinned() -> None:
    """The oldest and the newest transformers and TRL that are supported are pinned, and CI tests with both."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    bounds = {needed.name: needed.specifier for needed in map(Requirement, lines)}
    oldest, newest = (
        dict(line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line)
        for name in ("constraints-oldest.txt", "constraints.txt")
    )
    for name in ("transformers", "trl"):
        lowest = min(Version(one.version) for one in bounds[name])
        assert Version(oldest[name]).release[:2] == lowest.release[:2] and bounds[name].contains(newest[name]), name
    ci = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "make test-oldest" in ci and "make test\n" in ci


def test_r28_everything_but_kernels_works_without_a_gpu(plain: Path, tmp_path: Path) -> None:
    """Without a GPU a model loads, trains and saves in plain torch, and errors keep the exception that caused them."""
    model, tokenizer = adapted(plain, device_map="cpu")
    ids = IDS.cpu()
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad) and model.device.type == "cpu"
    model.save_pretrained_merged(tmp_path / "out", tokenizer)
    assert torch.equal(logits(stock(tmp_path / "out").cpu()), logits(model))
    broken = Path(shutil.copytree(plain, tmp_path / "broken"))
    (broken / "config.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        load(broken)
    assert caught.value.__cause__ is not None


def test_r29_nothing_global_is_patched(bare: dict[str, Any]) -> None:
    """After loading, training and generating with hasten, transformers, PEFT, torch and the environment are as they were."""
    assert bare["changed"] == [] and bare["environment"] == []
    assert bare["stock is stock"] and bare["tokenizer"] in ("left", "right")


def test_r29_the_order_of_imports_does_not_matter(plain: Path) -> None:
    """hasten imported before transformers, PEFT and TRL gives the same model."""
    code = (
        "import sys, hasten; from hasten import FastLanguageModel as F; import trl, peft, transformers, torch\n"
        "m, _ = F.from_pretrained(sys.argv[1], 64, torch.float32, load_in_4bit=False)\n"
        "ids = torch.arange(6, 26, device=m.device)[None]\n"
        "print(float(m.eval()(ids).logits.cpu().double().sum()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(plain)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.splitlines()[-1]) == float(
        logits(load(plain)[0], torch.arange(6, 26)[None]).double().sum()
    )


def test_r31_no_connection_is_tried(bare: dict[str, Any], plain: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A local model loads, trains and is saved without one attempt to connect, and there is no telemetry."""
    assert bare["connects"] == []
    tried: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: tried.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: tried.append(a) or [])
    model, tokenizer = adapted(plain)
    trainer(model, tokenizer, chats(), tmp_path).train()
    model.save_pretrained_merged(tmp_path / "out", tokenizer)
    assert tried == []
    words = re.compile(r"telemetry|analytics|posthog|requests\.(get|post)|urlopen")
    assert not [str(path) for path in SOURCES if words.search(path.read_text())]


def test_r32_no_code_is_generated(bare: dict[str, Any]) -> None:
    """No source is generated or executed at run time, and nothing is written into the working directory."""
    assert bare["cwd"] == []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {"exec", "eval", "compile", "inspect.getsource"}, path


@pytest.mark.full
def test_r32_datasets_are_prepared_by_several_processes(plain: Path, tmp_path: Path) -> None:
    """`dataset_num_proc` is honoured: four processes prepare the examples that one prepares."""
    model, tokenizer = adapted(plain)
    one, four = (trainer(model, tokenizer, chats(), tmp_path, dataset_num_proc=count) for count in (1, 4))
    assert [list(r["input_ids"]) for r in one.train_dataset] == [list(r["input_ids"]) for r in four.train_dataset]


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_r33_nothing_in_a_file_is_executed(plain: Path, tmp_path: Path) -> None:
    """Pickled weights and code that a config or tokenizer names are refused or ignored; neither runs, whatever the file says."""
    fired = tmp_path / "fired"
    model, tokenizer = adapted(plain)
    model.save_pretrained_merged(tmp_path / "adapter", tokenizer, save_method="lora")
    pickled, adapter, coded = (tmp_path / name for name in ("pickled", "pickled adapter", "coded"))
    for source, target, name in (
        (plain, pickled, "pytorch_model.bin"),
        (tmp_path / "adapter", adapter, "adapter_model.bin"),
    ):
        shutil.copytree(source, target)
        for weights in target.glob("*.safetensors*"):
            weights.unlink()
        (target / name).write_bytes(pickle.dumps(Bomb(fired)))
        with pytest.raises(CheckpointError, match="safetensors"):
            load(target)
    shutil.copytree(plain, coded)
    (coded / "modeling.py").write_text(f"from pathlib import Path\nPath({str(fired)!r}).touch()\nclass Evil: pass\n")
    names = {
        "AutoConfig": "modeling.Evil",
        "AutoModelForCausalLM": "modeling.Evil",
        "AutoTokenizer": ["modeling.Evil", None],
    }
    for file in ("config.json", "tokenizer_config.json"):
        change = {"auto_map": names, "trust_remote_code": True}
        (coded / file).write_text(json.dumps(as_json(coded / file) | change))
    try:
        assert torch.equal(logits(load(coded)[0]), logits(load(plain)[0]))
    except HastenError as error:
        assert "trust_remote_code" in str(error)
    assert not fired.exists()


def test_r49_the_doctor_finds_each_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """`hasten doctor` exits with 1 and says what to do for each problem of a machine; every dependency is pinned in a lock file."""
    healthy = dataclasses.replace(doctor.look(), gpus=(), driver=False, free_disk_gib=100.0, cache_writable=True)
    faults: dict[str, dict[str, Any]] = {
        "python": {"python": "3.9.0"},
        "transformers": {"installed": {**healthy.installed, "transformers": "4.40.0"}},
        "peft": {"installed": {n: v for n, v in healthy.installed.items() if n != "peft"}},
        "gpu": {"driver": True},
        "disk": {"free_disk_gib": 0.2},
        "hub cache": {"cache_writable": False},
    }
    monkeypatch.setattr(doctor, "look", lambda: healthy)  # what the doctor finds on a machine
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    for subject, change in faults.items():
        monkeypatch.setattr(doctor, "look", lambda change=change: dataclasses.replace(healthy, **change))
        done = CliRunner().invoke(app, ["doctor"])
        assert done.exit_code == 1 and subject in done.output, subject
        (found,) = doctor.problems(doctor.examine(doctor.look()))
        assert found.subject == subject and found.fix
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    needs = doctor.own_requirements()[1] or ()
    assert {need.name.lower() for need in needs} <= pinned
