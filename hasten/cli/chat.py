"""`hasten generate` without a prompt: a conversation, line by line, from a terminal or from piped lines."""

import sys
from collections.abc import Iterable, Iterator

import typer

from hasten.cli.adapters import Adapters
from hasten.cli.answer import Settings, answer, encode
from hasten.cli.console import note, say, show_error
from hasten.errors import HastenError, InputError

COMMANDS = {
    "/reset": "start a new conversation; the system prompt stays",
    "/system": "show the system prompt; /system TEXT sets it and starts a new conversation; /system - removes it",
    "/adapter": "show the adapters; /adapter NAME makes one active, none the base alone; the conversation stays",
    "/help": "show this",
    "/exit": "end; so does the end of the input",
}


class Chat:
    """messages: the conversation, as chat templates take it. An error leaves it as it was before the line."""

    def __init__(self, adapters: Adapters, settings: Settings, system: str | None) -> None:
        self._adapters, self._settings, self._system = adapters, settings, system
        self.messages: list[dict[str, str]] = []
        self._reset()

    def run(self, lines: Iterable[str]) -> None:
        """Answers every line until /exit. Errors are printed, and the next line is read."""
        for line in lines:
            if line in ("/exit", "/quit"):
                return
            try:
                if line.startswith("/"):
                    self._command(*line.split(None, 1))
                elif line.strip():
                    self._say(line.strip())
            except HastenError as error:
                show_error(error)

    def _say(self, text: str) -> None:
        settings, used = self._settings, self._adapters
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = encode(used.tokenizer, messages, settings.raw)
        left = settings.max_seq_length - len(prompt)
        if left < 1:
            raise InputError(
                f"the conversation has {len(prompt)} tokens with this message, which was not added; the model was "
                f"loaded for {settings.max_seq_length}, and nothing is cut off silently. /reset starts a new "
                "conversation, or start again with a larger --max-seq-length."
            )
        most = min(settings.max_new_tokens, left)
        given = answer(used.model, used.tokenizer, prompt, most, settings.sampling)
        if not settings.raw:
            self.messages = [*messages, {"role": "assistant", "content": given.text}]
        note(given.speed())
        if not given.ended and given.tokens >= most:
            limit = "--max-new-tokens" if most == settings.max_new_tokens else "--max-seq-length"
            note(f"the answer was ended by {limit} {getattr(settings, limit[2:].replace('-', '_'))}")

    def _command(self, name: str, argument: str = "") -> None:
        argument = argument.strip()
        if name == "/reset" and not argument:
            self._reset()
            note("new conversation")
        elif name == "/system":
            self._set_system(argument)
        elif name == "/adapter":
            if argument:
                self._adapters.use(argument)
            note(f"adapter: {self._adapters.active} (of {', '.join(self._adapters.names)})")
        elif name == "/help":
            for command, meaning in COMMANDS.items():
                say(f"{command:9} {meaning}")
        else:
            raise InputError(
                f"{name} {argument}".rstrip()
                + f" is not a command: there is {', '.join(COMMANDS)}. A message that starts with a "
                "slash needs a space before it."
            )

    def _set_system(self, text: str) -> None:
        if text and self._settings.raw:
            raise InputError("a system prompt needs the chat template, which --raw leaves out")
        if text:
            self._system = None if text == "-" else text
            self._reset()
        note(f"system: {self._system or 'none'}" + ("; new conversation" if text else ""))

    def _reset(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]


def read_lines() -> Iterator[str]:
    """Yields the lines of stdin, with a prompt at a terminal. Ends at the end of the input.

    Raises InputError for a line that is not text.
    """
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        try:
            import readline  # noqa: F401  gives `input` line editing and a history; Windows has its own
        except ImportError:
            note("no line editing: Python's readline is missing")
    while True:
        try:
            line = input("> ") if at_terminal else sys.stdin.readline()
        except EOFError:
            return
        except KeyboardInterrupt:  # meant for an answer that ended just before
            typer.echo()
            note("/exit ends the chat")
            continue
        except UnicodeDecodeError as error:
            raise InputError(f"a line of the input is not text ({error}); save it as UTF-8") from error
        if not line and not at_terminal:
            return
        yield line.rstrip("\r\n")
