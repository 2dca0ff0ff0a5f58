"""Resizes the vocabulary: new rows of embedding and head are the mean of the old ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds random draws inside; restores the caller's generators, on all devices, afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def rows_of(model: PreTrainedModel) -> int:
    """Returns the number of rows of the model's input embedding, i.e. of token ids."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape[0]


@torch.no_grad()
def resize(model: PreTrainedModel, rows: int, seed: int) -> None:
    """Resizes input embedding and head to `rows` rows each, and the config with them; tied ones stay tied.

    New rows are the mean of all old ones, taken in fp32 and rounded once (Hewitt 2021, "Initializing new word
    embeddings for pretrained language models"). Surplus rows are cut from the end. Embedding and head must be dense, as
    every quantised format leaves them.
    """
    old = rows_of(model)
    if rows == old:
        return
    # transformers draws new rows at random before they are overwritten here; that must not change the caller's generator.
    with seeded(seed):
        model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    for layer in (model.get_input_embeddings(), head):
        if layer is None:
            continue
        for parameter in layer.parameters(recurse=False):
            if rows > old and parameter.shape[0] == rows:
                parameter[old:] = parameter[:old].float().mean(dim=0).to(parameter.dtype)
