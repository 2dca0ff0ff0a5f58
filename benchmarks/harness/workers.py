"""A process that is started, asked and always ended: the other side of serve.py and of card.py's second process."""

import contextlib
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


class WorkerFailed(Exception):
    """A worker died, answered with an error, or did not answer in time. The message says which and ends with its stderr."""


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of benchmarks in a process of its own."""
    return [sys.executable, "-m", f"benchmarks.{name}", *arguments]


class Worker:
    """One process. command: how to start it; it prints one line of JSON when ready and one for each command."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self._log = tempfile.NamedTemporaryFile(mode="w+", prefix=f"{name}-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, bufsize=1
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._commands, self._answers = self._process.stdin, self._process.stdout
        self._reader = ThreadPoolExecutor(1)

    def reply(self, timeout: float) -> dict[str, Any]:
        """Returns the next answer. Raises WorkerFailed if it is an error or does not come within `timeout` seconds."""
        try:
            line = self._reader.submit(self._answers.readline).result(timeout)
        except TimeoutError:
            self._kill()
            raise WorkerFailed(f"no answer within {timeout:.0f} s{self._tail()}") from None
        if not line:
            code = self._process.wait()
            self._close()
            raise WorkerFailed(f"died with exit code {code}{self._tail()}")
        answer = json.loads(line)
        if "error" in answer:
            self.end()
            raise WorkerFailed(f"{answer['error']}{self._tail()}")
        return answer

    def ask(self, timeout: float, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends a command and returns its answer. Raises WorkerFailed as `reply` does, and if the process has been ended."""
        if self._commands.closed:
            raise WorkerFailed("was ended before")
        try:
            self._commands.write(json.dumps({"do": do, **arguments}) + "\n")
            self._commands.flush()
        except BrokenPipeError:
            pass  # the process is gone: the reply below reports why
        return self.reply(timeout)

    def _tail(self) -> str:
        text = Path(self._log.name).read_text(errors="replace").strip()
        return "\n" + text[-3000:] if text else ""

    def end(self) -> None:
        """Closes stdin, then kills the process if it does not end within 10 s. Safe to call twice."""
        self._close_commands()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._kill()
        self._close()

    def _close_commands(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # the process is gone, and did not read what was sent
            self._commands.close()

    def _close(self) -> None:
        """Closes both pipes of a process that has ended: a waiting reader has seen the end of its output."""
        self._close_commands()
        self._reader.shutdown()
        self._answers.close()

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close()
