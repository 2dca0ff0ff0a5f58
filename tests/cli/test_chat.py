"""`hasten generate` without a prompt: a conversation through the chat template, which goes on after errors."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from checkpoint_kit import poison
from transformers import LogitsProcessor, LogitsProcessorList
from typer.testing import CliRunner

from hasten.cli import FAILED, app
from hasten.cli.adapters import Adapters
from hasten.cli.answer import Settings
from hasten.cli.chat import COMMANDS, Chat, read_lines
from hasten.errors import InputError
from hasten.inference.text import decoder
from hasten.methods import CausalLMMethods
from hasten.patching import apply
from hasten.testing.tiny import save_tiny, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
GREEDY = {"do_sample": False}


def model() -> Any:
    """The head is not tied: a tied one mostly repeats the last token."""
    made = tiny_model("llama", tie_word_embeddings=False, max_position_embeddings=256)
    apply(made, methods=CausalLMMethods)
    return made


def chat(lines: Sequence[str], system: str | None = None, tokenizer: Any = TOKENIZER, **settings: Any) -> Chat:
    values = {"max_seq_length": 200, "max_new_tokens": 8, "sampling": GREEDY, **settings}
    made = Chat(Adapters(model(), tokenizer, {}), Settings(**values), system)
    made.run(lines)
    return made


def expected(messages: list[dict[str, str]], most: int = 8) -> str:
    ids: Any = TOKENIZER.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    new = model().generate(**ids, max_new_tokens=most, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return decoder(TOKENIZER)(new.tolist())


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return opening + [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]


def plain(text: str) -> str:
    return " ".join(text.split())


def test_answers_see_the_whole_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    done = chat(["one", "", "two"], system="be brief")
    first = expected(turns("one", system="be brief"))
    second = expected(turns("one", first, "two", system="be brief"))
    assert done.messages == turns("one", first, "two", second, system="be brief")
    assert second != expected(turns("two", system="be brief"))
    said = capsys.readouterr()
    assert said.out == f"{first}\n{second}\n"
    assert said.err.count("tokens/s") == 2 and "+ 8 tokens, the first after " in said.err


def test_commands_change_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    alone = expected(turns("two"))
    assert chat(["one", "/reset", "two"]).messages == turns("two", alone)
    terse = expected(turns("two", system="terse"))
    assert chat(["one", "/system terse", "two"]).messages == turns("two", terse, system="terse")
    assert chat(["/system -", "two"], system="terse").messages == turns("two", alone)
    assert chat(["one", "/reset"], system="terse").messages == turns(system="terse")
    assert chat(["/exit", "one"]).messages == chat(["/quit", "one"]).messages == []
    capsys.readouterr()
    chat(["/help", "/system", "/adapter"], system="terse")
    said = capsys.readouterr()
    assert all(command in said.out for command in COMMANDS)
    assert "system: terse" in said.err and "adapter: none (of none)" in said.err


@pytest.mark.parametrize("line", ["/rest", "/reset now", "/usr/bin", "/"])
def test_what_is_not_a_command_is_said_and_not_sent(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = chat([line, f" {line}"])
    said = capsys.readouterr().err
    assert f"InputError: {line} is not a command: there is /reset, /system" in plain(said)
    assert done.messages[0] == {"role": "user", "content": line} and len(done.messages) == 2


def test_a_conversation_that_is_too_long_says_so_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    done = chat(["abcd", "x" * 40, "/reset", "efgh"], max_seq_length=30)
    said = plain(capsys.readouterr().err)
    ids: Any = TOKENIZER.apply_chat_template(
        turns("abcd", expected(turns("abcd")), "x" * 40), add_generation_prompt=True, return_dict=True
    )
    length = len(ids["input_ids"])
    assert f"InputError: the conversation has {length} tokens with this message, which was not added" in said
    assert "the model was loaded for 30" in said and "/reset starts a new conversation" in said
    assert done.messages == turns("efgh", expected(turns("efgh")))


def test_a_limit_that_ends_an_answer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    chat(["abcd"], max_new_tokens=5)
    assert "the answer was ended by --max-new-tokens 5" in plain(capsys.readouterr().err)
    done = chat(["abcd"], max_seq_length=14)  # 8 of the prompt
    assert "the answer was ended by --max-seq-length 14" in plain(capsys.readouterr().err)
    assert done.messages[1]["content"] == expected(turns("abcd"), most=6)


def test_errors_are_one_message_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    without = chat(["one", "two"], tokenizer=tiny_tokenizer(None))
    said = plain(capsys.readouterr().err)
    assert said.count("TokenizerError: a conversation was given, and the tokenizer has no chat template") == 2
    assert without.messages == []
    refusing = tiny_tokenizer("{{ raise_exception('no system') if messages[0].role == 'system' else 'x' }}")
    done = chat(["one", "/system -", "two"], system="x", tokenizer=refusing)
    assert "TokenizerError: the chat template does not take this conversation" in plain(capsys.readouterr().err)
    assert [message["content"] for message in done.messages][0] == "two"


def test_raw_lines_are_continued_alone(capsys: pytest.CaptureFixture[str]) -> None:
    done = chat(["one", "two", "/system x"], tokenizer=tiny_tokenizer(None), raw=True)
    ids = TOKENIZER("two", return_tensors="pt")
    new = model().generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    said = capsys.readouterr()
    assert said.out.endswith(decoder(TOKENIZER)(new.tolist()) + "\n") and done.messages == []
    assert "InputError: a system prompt needs the chat template" in said.err


class Interrupt(LogitsProcessor):
    """Ctrl-C in the fifth step."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.steps += 1
        if self.steps == 5:
            raise KeyboardInterrupt
        return scores


def test_an_interrupt_ends_the_answer_and_not_the_chat() -> None:
    done = chat(["one", "two"], sampling={**GREEDY, "logits_processor": LogitsProcessorList([Interrupt()])})
    assert len(done.messages) == 4
    assert done.messages[1]["content"] == expected(turns("one"), most=4)


def test_lines_come_from_a_pipe_and_from_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_bytes(b"one\r\n\n/exit")
    with file.open() as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert list(read_lines()) == ["one", "", "/exit"]
    file.write_bytes(b"\xff\xfe\n")
    with file.open(encoding="utf-8") as pipe, pytest.raises(InputError, match="not text"):
        monkeypatch.setattr(sys, "stdin", pipe)
        list(read_lines())

    class Terminal:
        def isatty(self) -> bool:
            return True

    typed: Iterator[Any] = iter(["one", KeyboardInterrupt, "two", EOFError])

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    assert list(read_lines()) == ["one", "two"]


def call(*args: object, lines: str = "") -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters of it, and one of another shape."""
    from hasten import FastLanguageModel

    made = tmp_path_factory.mktemp("chat")
    save_tiny(made / "base", tie_word_embeddings=False)
    save_tiny(made / "wide", tie_word_embeddings=False, hidden_size=128)
    for name, base, seed in (("first", "base", 1), ("second", "base", 2), ("other", "wide", 3)):
        network, tokenizer = FastLanguageModel.from_pretrained(str(made / base), 64, load_in_16bit=True)
        adapted = FastLanguageModel.get_peft_model(network, r=4, random_state=seed, init_lora_weights=False)
        adapted.save_pretrained(made / name)
        if name == "second":
            tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}!"
            tokenizer.save_pretrained(made / name)
    return made


def test_piped_lines_and_adapters(folder: Path) -> None:
    load = ("--load", "16bit", "--max-new-tokens", 6)
    adapters = ("--adapter", folder / "first", "--adapter", f"2nd={folder / 'second'}")
    lines = "hi\n/reset\n/adapter 2nd\nhi\n/reset\n/adapter none\nhi\n/adapter third\n/reset\n/adapter first\nhi\n"
    done = call("generate", folder / "base", *load, *adapters, lines=lines)
    assert done.exit_code == 0, done.stderr
    assert "adapter: 2nd (of first, 2nd, none)" in done.stderr
    assert "InputError: there is no adapter 'third'" in done.stderr
    answers = done.stdout.splitlines()
    alone = [
        call("generate", folder / name, *load, lines="hi\n").stdout.splitlines() for name in ("first", "second", "base")
    ]
    assert [[one] for one in answers] == [*alone, alone[0]]  # the second has a template of its own
    assert len({*answers}) == 3


def test_adapters_are_checked_before_the_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    base = poison(Path(shutil.copytree(folder / "base", tmp_path / "base")))
    assert "NaN" in call("generate", base, "--load", "16bit").stderr
    for given, said in (
        (folder / "absent", "is not a folder, and adapter_config.json"),
        (folder / "base", "is not an adapter"),
        (folder / "other", "wrong shape: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is [4, 128]"),
    ):
        for command in ("generate", "serve"):
            done = call(command, base, "--load", "16bit", "--adapter", given)
            assert done.exit_code == FAILED and said in plain(done.stderr), done.stderr
    on_adapter = call("generate", folder / "first", "--load", "16bit", "--adapter", folder / "second")
    assert on_adapter.exit_code == FAILED and "which is an adapter itself; pass its base" in plain(on_adapter.stderr)
    twice = call("generate", base, "--adapter", folder / "first", "--adapter", folder / "first")
    assert twice.exit_code == 2 and "two adapters are named 'first'" in plain(twice.stderr)
    none = call("generate", base, "--adapter", f"none={folder / 'first'}")
    assert none.exit_code == 2 and "an adapter cannot be named 'none'" in plain(none.stderr)


def test_arguments_without_effect_are_refused_before_anything_is_loaded() -> None:
    for arguments, said in (
        (("--top-p", 0.5), "--top-p has no effect on greedy decoding"),
        (("--top-k", 5, "--seed", 1), "2 problems"),
        (("--raw", "--system", "x"), "--system needs the chat template, which --raw leaves out"),
    ):
        done = call("generate", "nowhere", *arguments)
        assert done.exit_code == FAILED and said in plain(done.stderr), done.stderr


def test_prompts_take_the_options_of_the_chat(folder: Path) -> None:
    load = ("--load", "16bit", "--max-new-tokens", 6)
    piped = call("generate", folder / "base", *load, "--system", "be brief", lines="hi\n")
    given = call("generate", folder / "base", "hi", *load, "--system", "be brief")
    assert given.stdout == piped.stdout and given.exit_code == 0 and not given.stderr
    sampled = [
        call(
            "generate",
            folder / "base",
            "hi",
            *load,
            "--temperature",
            1.5,
            "--top-k",
            50,
            "--top-p",
            0.9,
            "--seed",
            seed,
        ).stdout
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
