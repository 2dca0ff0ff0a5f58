"""Hub ids, against a hub on the loopback address. A child process loads, since the endpoint is read at import."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, serve
from transformers import AutoModelForCausalLM

from hasten.testing import save_tiny

CHILD = """
import json, sys
import torch
from hasten.errors import HastenError
from hasten.loading import load
from hasten.options import LoadOptions

answers = []
for call in json.loads(sys.argv[1]):
    try:
        found = load(LoadOptions.from_call(max_seq_length=64, dtype=torch.float32, **call))
    except HastenError as error:
        answers.append({"error": type(error).__name__, "said": str(error)})
        continue
    answers.append({
        "name": found.model.name_or_path, "config": found.model.config._name_or_path, "notes": found.notes,
        "revision": found.source.revision, "norm": float(found.model.model.norm.weight.detach().sum()),
        "files": sorted(p.name for p in found.source.folder.iterdir()), "adapter": str(found.adapter or ""),
    })
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


def ask(hub: Hub, home: Path, *calls: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
    hub.log.clear()
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_")) and "proxy" not in k.lower()
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(calls)],
        env={**clean, "PYTHONPATH": paths, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def norm_of(folder: Path) -> float:
    return float(AutoModelForCausalLM.from_pretrained(folder).model.norm.weight.detach().sum())


def test_revision_token_shards_and_cache(hub: Hub, tmp_path: Path) -> None:
    new, old = save_tiny(tmp_path / "new", max_shard_size="100KB", seed=1), save_tiny(tmp_path / "old", seed=2)
    (new / "pytorch_model.bin").write_bytes(b"pickle")
    (new / "original").mkdir()
    (new / "original" / "params.json").write_text("{}")
    (new / "modeling_evil.py").write_text("raise SystemExit")
    newest, tagged = hub.add("who/secret", new, "main"), hub.add("who/secret", old, "v1")
    hub.private["who/secret"] = "hf_right"
    call = {"model_name": "who/secret", "token": "hf_right"}
    main, v1, no_tag = ask(hub, tmp_path / "home", call, {**call, "revision": "v1"}, {**call, "revision": "v9"})
    assert {token for path, token in hub.log if "who/secret" in path} == {"hf_right"}
    assert not hub.asked("pytorch_model.bin")
    assert (main["revision"], v1["revision"]) == (newest, tagged)
    assert (main["norm"], v1["norm"]) == (pytest.approx(norm_of(new)), pytest.approx(norm_of(old)))
    assert main["name"] == main["config"] == "who/secret"
    assert f"weights: who/secret at revision {newest}" in main["notes"]
    assert f"weights: who/secret at revision {tagged}" in v1["notes"]
    assert not {"pytorch_model.bin", "original", "modeling_evil.py"} & set(main["files"])
    assert sum(name.endswith(".safetensors") for name in main["files"]) > 2
    assert (no_tag["error"], "no such revision" in no_tag["said"]) == ("CheckpointError", True)
    refused = ask(hub, tmp_path / "empty home", {**call, "token": "hf_wrong"})[0]
    assert (refused["error"], "token=" in refused["said"]) == ("CheckpointError", True)

    hub.log.clear()
    cached = ask(hub, tmp_path / "home", {**call, "local_files_only": True}, HF_HUB_OFFLINE="1")[0]
    assert cached["norm"] == main["norm"]
    assert hub.log == []


def test_a_call_that_is_refused_downloads_no_weights(hub: Hub, tmp_path: Path) -> None:
    hub.add("who/gemma", save_tiny(tmp_path / "gemma", "gemma"), "main")
    answer = ask(hub, tmp_path / "home", {"model_name": "who/gemma", "offload_embedding": True})[0]
    assert answer["error"] == "OptionError"
    assert hub.asked("config.json")
    assert not hub.asked(".safetensors")


def test_an_adapter_id_brings_its_base_at_the_recorded_revision(hub: Hub, tmp_path: Path) -> None:
    hub.add("who/base", save_tiny(tmp_path / "new", seed=3), "main")
    old = save_tiny(tmp_path / "old", seed=4)
    commit = hub.add("who/base", old, "v1")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    record = {"base_model_name_or_path": "who/base", "revision": "v1", "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(record))
    (adapter / "adapter_model.safetensors").write_bytes(b"\x02" + b"\x00" * 7 + b"{}")
    hub.add("who/adapter", adapter, "main")
    found = ask(hub, tmp_path / "home", {"model_name": "who/adapter"})[0]
    assert (found["name"], found["revision"]) == ("who/base", commit)
    assert found["norm"] == pytest.approx(norm_of(old))
    assert (Path(found["adapter"]) / "adapter_model.safetensors").is_file()
    assert any(note.startswith("adapter: who/adapter at revision ") for note in found["notes"])


def test_subfolders_missing_ids_and_a_hub_that_is_gone(hub: Hub, tmp_path: Path) -> None:
    save_tiny(tmp_path / "repo" / "inner", seed=5)
    hub.add("who/nested", tmp_path / "repo", "main")
    nested, absent, odd = ask(
        hub,
        tmp_path / "home",
        {"model_name": "who/nested", "subfolder": "inner"},
        {"model_name": "who/absent", "token": "hf_any"},
        {"model_name": "two words"},
    )
    assert nested["norm"] == pytest.approx(norm_of(tmp_path / "repo" / "inner"))
    assert "no such repository" in absent["said"]
    assert "'owner/model'" in odd["said"]
    gone = ask(hub, tmp_path / "other", {"model_name": "who/nested"}, HF_ENDPOINT="http://127.0.0.1:9")[0]
    assert (gone["error"], "Check the connection" in gone["said"]) == ("CheckpointError", True)
