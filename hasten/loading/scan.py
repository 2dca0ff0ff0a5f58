"""Looks for NaN and infinity in the files of a dense checkpoint while transformers quantises it.

Quantised codes no longer tell NaN from a number, so the values must be looked at in the file. A thread does it, file by
file in the order in which they are loaded: it reads the pages that the loader reads anyway, and torch's reductions run
without Python's lock.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from hasten.loading.shards import FLOATS, StoredTensor
from hasten.weights.finite import nonfinite_names


@contextmanager
def counting_nonfinite(
    folder: Path, stored: Mapping[str, StoredTensor], dtype: torch.dtype
) -> Iterator[Callable[[], dict[str, int]]]:
    """Yields a function that waits for the thread and returns {tensor name: values that are NaN or infinite in `dtype`};
    an empty dict where there are none, and where nothing is `stored`."""
    if not stored:
        yield dict
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        scan = pool.submit(_scan, folder, stored, dtype)
        yield scan.result


def _scan(folder: Path, stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> dict[str, int]:
    found: dict[str, int] = {}
    for file in sorted({entry.file for entry in stored.values()}):
        names = [name for name, entry in stored.items() if entry.file == file and entry.dtype in FLOATS]
        with safe_open(folder / file, framework="pt") as opened:
            found |= nonfinite_names(((name, opened.get_tensor(name)) for name in names), dtype)
    return found
