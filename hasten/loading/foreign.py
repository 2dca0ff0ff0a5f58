"""Turns whatever a parser of another library raises over a foreign file into one typed error that names the file."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hasten.errors import HastenError
from hasten.json_file import shown

LONG = 1000
"""The most characters of a parser's message that an error repeats."""


@contextmanager
def parsing(what: str, raises: type[HastenError], instead: str) -> Iterator[None]:
    """Runs a parser of another library over a file that it may never have seen the like of.

    what: the file, as in "The config.json in x". instead: what the user can do. Only around calls that read or build
    from a foreign file: there, any exception means that the file is not what the parser expects, whichever line of the
    parser stumbled over it. Running out of GPU memory passes: the file is not the cause.
    """
    try:
        yield
    except (HastenError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise raises(f"{what} cannot be read ({type(error).__name__}: {shown(error, LONG)}). {instead}") from error
    except BaseException as error:
        # Code in Rust (tokenizers, safetensors) reports an unforeseen input as pyo3's PanicException, outside of Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise raises(f"{what} cannot be read (the parser failed: {shown(error, LONG)}). {instead}") from error
