"""Looks at a tokenizer's chat template, which is foreign code: it runs in another process, with limits on time and
memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hasten.json_file import shown

SCRIPT = Path(__file__).with_name("render_template.py")
SECONDS = 5
MEMORY = 2**30
LARGEST = 2**20
"""The most characters of a template; published ones have up to 50,000."""
TURN = [{"role": "user", "content": "x"}]


class TemplateFailure(ValueError):
    """A chat template that could not be rendered, and why."""


def template_notes(tokenizer: Any, seconds: int = SECONDS) -> list[str]:
    """Returns for the report what is wrong with the tokenizer's chat template, without running it in this process.
    seconds: CPU time that it may take."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    try:
        asked, plain = render(
            tokenizer.get_chat_template(),
            [{"messages": TURN, **_tokens(tokenizer), "add_generation_prompt": prompt} for prompt in (True, False)],
            seconds,
        )
    except (TemplateFailure, ValueError) as error:
        return [f"chat template: cannot render a single user turn ({shown(error)})"]
    if asked != plain:
        return []
    return ["chat template: add_generation_prompt adds nothing, so generation does not start with the assistant's turn"]


def render(template: str, variables: list[dict[str, Any]], seconds: int = SECONDS) -> list[str]:
    """Returns the template's text for each set of variables, after at most `seconds` of CPU time and in `MEMORY` bytes.

    Raises TemplateFailure where the template raises, or takes longer or more.
    """
    if not isinstance(template, str) or len(template) > LARGEST:
        raise TemplateFailure(f"it must be text of at most {LARGEST} characters")
    order = {"template": template, "variables": variables, "seconds": seconds, "bytes": MEMORY}
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT)],
            input=json.dumps(order),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=4 * seconds,  # a busy machine gives little CPU time in a second
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TemplateFailure(f"it does not end within {4 * seconds} s") from error
    if done.returncode < 0:  # ended by the system, at one of the limits
        raise TemplateFailure(f"it takes more than {seconds} s, or more than {MEMORY >> 20} MiB")
    if done.returncode:
        raise TemplateFailure(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def _tokens(tokenizer: Any) -> dict[str, str]:
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
