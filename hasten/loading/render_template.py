"""A script: renders a chat template in a process of its own, under limits. Run by `hasten.loading.template`.

Reads {"template", "variables", "seconds", "bytes"} as JSON from stdin; `variables` is a list with the template's
variables for each rendering. Writes the texts as a JSON list; what the template raises ends the process, with its
traceback on stderr. Imports nothing but jinja2, so that it starts in 0.2 s.
"""

import json
import sys
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 2**20
"""The most characters of a text that are sent back."""


class Generation(Extension):
    """`{% generation %}`, with which transformers marks the assistant's tokens: renders what is inside."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def environment() -> ImmutableSandboxedEnvironment:
    """Returns an environment with the names that transformers gives to chat templates."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], optimized=False
    )

    def refuse(message: str) -> None:
        raise TemplateError(message)

    made.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    made.filters["tojson"] = lambda value, indent=None, **_: json.dumps(value, ensure_ascii=False, indent=indent)
    return made


def limit(seconds: int, size: int) -> None:
    """Lets the system end this process at `seconds` of CPU time or `size` bytes of memory, where it has such limits."""
    try:
        import resource
    except ImportError:  # Windows: only the caller's timeout ends this process
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main() -> None:
    """Renders what stdin asks for."""
    asked = json.load(sys.stdin)
    limit(asked["seconds"], asked["bytes"])
    template = environment().from_string(asked["template"])
    json.dump([template.render(**one)[:LONGEST] for one in asked["variables"]], sys.stdout)


if __name__ == "__main__":
    main()
