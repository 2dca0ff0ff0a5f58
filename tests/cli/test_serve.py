"""`hasten serve` as a process: it says where it serves and how, answers, and ends at an interrupt."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from typer.testing import CliRunner

from hasten import FastLanguageModel
from hasten.cli import FAILED, app
from hasten.inference.text import decoder
from hasten.testing.tiny import save_tiny

COMMAND = "from hasten.cli import app; app()"


def test_a_served_adapter_answers_as_it_does_in_python(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", tie_word_embeddings=False)
    network, tokenizer = FastLanguageModel.from_pretrained(str(tmp_path / "base"), 64, load_in_16bit=True)
    adapted = FastLanguageModel.get_peft_model(network, r=4, init_lora_weights=False)
    adapted.save_pretrained(tmp_path / "adapter")
    arguments = [
        "base",
        "--load",
        "16bit",
        "--adapter",
        "adapter",
        "--port",
        "0",
        "--name",
        "mine",
        "--max-seq-length",
        "64",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "serve", *arguments],
        cwd=tmp_path,
        env={**os.environ, "HASTEN_API_KEY": "sesame"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        assert first.startswith("mine: http://127.0.0.1:") and first.endswith("/v1\n"), process.stderr.read()
        how = process.stdout.readline().strip()
        with openai.OpenAI(base_url=first.split()[1], api_key="sesame", max_retries=3, timeout=30) as client:
            done = client.completions.create(model="mine", prompt="hi", max_tokens=8, temperature=0)
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="other").models.list()
        adapted.for_inference()
        ids: Any = tokenizer("hi", return_tensors="pt")
        new = adapted.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert done.choices[0].text == decoder(tokenizer)(new.tolist())
        assert len(set(new.tolist())) > 2
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    if not torch.cuda.is_available():
        assert how == "one request at a time through model.generate, since the model is not on a GPU"
    assert "Traceback" not in errors


def call(*args: object) -> str:
    done = CliRunner().invoke(app, ["serve", *map(str, args)])
    assert done.exit_code == FAILED and "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def test_what_cannot_be_served_is_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"InputError: the address 127.0.0.1, port {port} cannot be used" in call("nowhere", "--port", port)
    assert "--api-key is empty" in call("nowhere", "--api-key", " ")
    assert "CheckpointError" in call("nowhere", "--port", 0)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "MissingExtraError: hasten serve needs fastapi" in (said := call("nowhere"))
    assert "pip install 'hasten[serve]'" in said
