"""A process that is started, asked and always ended: the other side of steps.py and longest.py's second process."""

import contextlib
import json
import queue
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any


class WorkerFailed(Exception):
    """A worker died, answered with an error, or did not answer in time. The message says which and ends with its stderr."""


class Worker:
    """One process. command: how to start it; it prints one line of JSON when ready and one for each command."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._log = tempfile.NamedTemporaryFile(mode="w+", prefix=f"{name}-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, bufsize=1
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def reply(self, timeout: float) -> dict[str, Any]:
        """Returns the next answer. Raises WorkerFailed if it is an error or does not come within `timeout` seconds."""
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self._kill()
            raise WorkerFailed(f"no answer within {timeout:.0f} s{self._tail()}") from None
        if line is None:
            code = self._process.wait()
            self._close_stdin()
            raise WorkerFailed(f"died with exit code {code}{self._tail()}")
        answer = json.loads(line)
        if "error" in answer:
            self.end()
            raise WorkerFailed(f"{answer['error']}{self._tail()}")
        return answer

    def ask(self, timeout: float, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a command and returns its answer. Raises WorkerFailed as `reply` does, and if the process has been ended."""
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            raise WorkerFailed("was ended before")
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process is gone: the reply below reports why
        return self.reply(timeout)

    def _tail(self) -> str:
        text = Path(self._log.name).read_text(errors="replace").strip()
        return "\n" + text[-3000:] if text else ""

    def end(self) -> None:
        """Closes stdin, then kills the process if it does not end within 10 s. Safe to call twice."""
        self._close_stdin()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._kill()

    def _close_stdin(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process is gone, and did not read what was sent
            self._process.stdin.close()

    def _kill(self) -> None:
        self._close_stdin()
        self._process.kill()
        self._process.wait()
