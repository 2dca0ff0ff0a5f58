"""Writes the same artefacts to a hub repository."""

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import nn

from hasten.export.folder import MARKER
from hasten.export.save import save_merged
from hasten.export.target import check_repo_id


def push_to_hub_merged(  # noqa: PLR0913
    model: nn.Module,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    api: HfApi | None = None,
    **kwargs: Any,
) -> Any:
    """Writes to a temporary folder as `save_merged` does, then uploads it in one commit; returns the hub's CommitInfo.

    private: of a repository that is created here (None = the account's default). revision: a branch, created if there is none.
    kwargs: `save_merged`'s max_shard_size, dtype, rows. Raises ExportError before anything is sent; the hub's own
    errors pass through.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token) if api is None else api
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_merged(model, folder, tokenizer, save_method, **kwargs)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=f"{save_method} by hasten",
            revision=revision,
            ignore_patterns=[MARKER],
        )
