"""Every kernel compiles for GPUs from Turing to Blackwell and fits into their shared memory; no GPU is needed for that.

Triton's interpreter, in which the other tests run on a CPU, takes kernels that the compiler refuses.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_kernels import ROOM

from benchmarks.kernels import launched_kernels

HERE = Path(__file__).parent


@pytest.mark.parametrize("capability", ROOM)
def test_every_kernel_compiles_and_fits(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_kernels.py"), str(capability)],
        env={**environment, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    made = [line.split() for line in done.stdout.splitlines()]
    assert set(launched_kernels()) <= {name for name, _ in made}
    assert not [one for one in made if int(one[1]) > ROOM[capability] * 2**10]
