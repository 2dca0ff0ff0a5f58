"""Gives the embedding and the head another number of rows, the new ones the mean of the old."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside come from `seed`; the caller's generators, on all devices, are then as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def rows_of(model: PreTrainedModel) -> int:
    """How many token ids the model's embedding has a row for."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight.shape[0]


@torch.no_grad()
def resize(model: PreTrainedModel, rows: int, seed: int) -> None:
    """Gives input embedding and head `rows` rows each; tied ones stay tied and the config says the same.

    New rows are the mean of all old ones, taken in fp32 and rounded once (Hewitt 2021, "Initializing new word embeddings
    for pretrained language models"). Surplus rows are cut from the end. Embedding and head must be dense, as
    bitsandbytes' quantisation leaves them.
    """
    old = rows_of(model)
    if rows == old:
        return
    # transformers draws new rows at random before they are overwritten here; that must not move the caller's generator.
    with seeded(seed):
        model.resize_token_embeddings(rows, mean_resizing=False)
    head = model.get_output_embeddings()
    for layer in (model.get_input_embeddings(), head):
        if layer is None:
            continue
        for parameter in layer.parameters(recurse=False):
            if rows > old and parameter.shape[0] == rows:
                parameter[old:] = parameter[:old].float().mean(dim=0).to(parameter.dtype)
