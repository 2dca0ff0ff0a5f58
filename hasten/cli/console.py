"""What all commands share: printing, silencing other libraries, loading a model."""

import logging
import warnings
from typing import Any

from rich.console import Console
from rich.text import Text

from hasten.errors import HastenError


def say(text: str, style: str = "") -> None:
    """Prints text as it is: brackets in a path are no markup, and ":name:" is no emoji."""
    Console().print(Text(text, style), soft_wrap=True)


def note(text: str) -> None:
    """Prints a line beside the output, to stderr."""
    Console(stderr=True).print(Text(text, "dim"), soft_wrap=True)


def show_error(error: HastenError) -> None:
    """Prints an error as one message, without a traceback."""
    said = Text.assemble((f"{type(error).__name__}: ", "bold red"), (str(error), "red"))
    Console(stderr=True).print(said, soft_wrap=True)


def quiet() -> None:
    """Silences progress bars and everything below errors in the libraries that a command uses."""
    import transformers

    from hasten.weights import formats

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    for package in formats.packages():
        logging.getLogger(package).setLevel(logging.ERROR)
    try:
        import datasets
    except ImportError:
        return  # only `train` and `demo` need it, and report it if it is missing
    datasets.disable_progress_bars()


def load_model(model: str, load: str, max_seq_length: int) -> tuple[Any, Any]:
    """Returns model and tokenizer. load: a value of --load."""
    from hasten.model import FastLanguageModel
    from hasten.weights import formats

    options: dict[str, Any] = {str(formats.by_choice(load).load_argument): True}
    return FastLanguageModel.from_pretrained(model, max_seq_length, **options)
