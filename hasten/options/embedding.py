"""Checks the input embedding in CPU memory (`offload_embedding`). Tied embeddings are refused by
`hasten.loading.checks`."""

from hasten.options.fields import LoadFields


def check(options: LoadFields) -> list[str]:
    """Refuses full fine-tuning, since an offloaded embedding is frozen."""
    if options.full_finetuning and options.offload_embedding:
        return ["offload_embedding keeps a frozen embedding in CPU memory, full_finetuning trains it; drop one of them"]
    return []
