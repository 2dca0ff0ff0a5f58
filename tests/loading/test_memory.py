"""Loading from many shards into CPU memory holds the result and less than two shards more."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hasten.testing import tiny_tokenizer

CHILD = """
import json, sys, threading, time
import torch
from hasten.loading import load
from hasten.options import LoadOptions

def own():
    # RssAnon leaves out pages of mapped files, which the system takes back whenever it wants.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

torch.set_num_threads(1)
load(LoadOptions.from_call(model_name=sys.argv[2], max_seq_length=64, device_map="cpu"))  # imports and warms up everything
peak, done = [own()], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], own())
        time.sleep(0.001)
before = own()
thread = threading.Thread(target=watch)
thread.start()
how = json.loads(sys.argv[3])
dtype = getattr(torch, how.pop("dtype"))
model = load(LoadOptions.from_call(model_name=sys.argv[1], max_seq_length=64, dtype=dtype, device_map="cpu", **how)).model
done.set()
thread.join()
print(json.dumps({"before": before, "peak": peak[0], "after": own(), "held": model.get_memory_footprint()}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("how", "share"),
    [
        ({"dtype": "bfloat16"}, 0.4),
        ({"dtype": "bfloat16", "load_in_8bit": True}, 0.6),
        ({"dtype": "bfloat16", "load_in_4bit": False}, 1.01),
        pytest.param({"dtype": "float32", "load_in_4bit": False}, 2.01, marks=pytest.mark.full),
    ],
    ids=["nf4", "int8", "dense", "dense, cast"],
)
def test_peak_memory(how: dict[str, Any], share: float, llama: Path, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=288, hidden_size=1024, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8
    )
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = empty.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).reshape(parameter.shape))
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    shard = dense // 12
    model.save_pretrained(tmp_path, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(tmp_path)
    del model, empty
    assert len(list(tmp_path.glob("*.safetensors"))) >= 10
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(llama), json.dumps(how)],
        env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout.splitlines()[-1])
    largest = max(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert memory["held"] < share * dense
    assert memory["peak"] - memory["before"] < memory["held"] + 2 * largest, memory
