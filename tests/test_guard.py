"""The guard over all tests works: here, and in processes that tests start."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import socket
try:
    socket.create_connection(("192.0.2.1", 80), timeout=0.1)
except PermissionError as error:
    print("offline" in str(error))
"""


def test_no_socket_leaves_the_machine() -> None:
    with pytest.raises(PermissionError, match="offline"):
        socket.create_connection(("192.0.2.1", 80), timeout=0.1)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_nothing_is_written_into_the_working_tree() -> None:
    target = Path(__file__).parent / "left_behind.txt"
    with pytest.raises(PermissionError, match="read-only"):
        target.write_text("x")
    with pytest.raises(PermissionError, match="read-only"):
        (Path(__file__).parent / "left_behind").mkdir()
    assert not target.exists()
