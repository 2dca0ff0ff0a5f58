"""Kernels compile for GPUs and fit into their shared memory; no GPU is needed for that.

Triton's interpreter, in which the other tests run on a CPU, accepts kernels that the compiler rejects. Every kernel is compiled
for Hopper, the largest also for GeForce. Others (T4, A100, Blackwell) take minutes: run compile_kernels.py by hand.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_kernels import ROOM

from benchmarks.kernels import launched_kernels

pytestmark = pytest.mark.full
HERE = Path(__file__).parent
WHOLE = 90
LARGEST = {"_attention_fwd", "_attention_dkdv", "_attention_dq", "_add_lora_delta", "_lora_delta_bwd"}


@pytest.mark.parametrize("capability", [89, WHOLE])
def test_kernels_compile_and_fit(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py"), str(capability), *(["all"] if capability == WHOLE else [])],
        env={**environment, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    made = [line.split() for line in done.stdout.splitlines()]
    assert (set(launched_kernels()) if capability == WHOLE else LARGEST) <= {name for name, _ in made}
    assert not [one for one in made if int(one[1]) > ROOM[capability] * 2**10]
