"""Finds a model: a local folder, a hub repository, or the base that an adapter names.

Two steps, so that a call can be refused before weights are downloaded: `resolve` fetches the small files, and
`fetch_weights` the weights. For a local folder no file is fetched.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hasten.errors import CheckpointError
from hasten.loading.adapter_files import read_adapter_config
from hasten.options import LoadOptions

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", "*.model", "*.tiktoken")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been found.

    name: hub id, or absolute path of a local folder. revision: the commit of a hub id. folder: where its files are
    on this machine. adapter: the adapter that was asked for, whose base this is. tokenizer: folder to read it from.
    """

    name: str
    revision: str | None
    folder: Path
    tokenizer: Path
    adapter: Path | None = None
    adapter_name: str | None = None

    def notes(self) -> list[str]:
        """Describes for the report what is loaded."""
        at = f" at revision {self.revision}" if self.revision else ""
        notes = [f"weights: {self.name}{at}"]
        return [*notes, f"adapter: {self.adapter_name}"] if self.adapter_name else notes


def resolve(options: LoadOptions) -> Source:
    """Finds `options.model_name` and fetches its small files. Raises CheckpointError if it does not exist."""
    found = _locate(options.model_name, options.revision, options)
    if not (found.folder / ADAPTER_CONFIG).is_file():
        _require_config(found)
        return found
    recorded = _adapter_record(found)
    if found.revision is not None:
        _download(found.name, found.revision, options, [ADAPTER_WEIGHTS])
    if not (found.folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"{found.name} has {ADAPTER_CONFIG} but no {ADAPTER_WEIGHTS}. An adapter is read from safetensors only; "
            "save it again with a current PEFT"
        )
    base = _locate(_base_name(recorded["base_model_name_or_path"], found), recorded.get("revision"), options)
    _require_config(base)
    tokenizer = found.folder if has_tokenizer(found.folder) else base.tokenizer
    at = f" at revision {found.revision}" if found.revision else ""
    return replace(base, tokenizer=tokenizer, adapter=found.folder, adapter_name=found.name + at)


def fetch_weights(source: Source, options: LoadOptions) -> None:
    """Downloads the weights of a hub source. Raises CheckpointError if that fails."""
    if source.revision is not None:
        kind = "*.bin" if options.use_safetensors is False else "*.safetensors"
        _download(source.name, source.revision, options, [kind])


def has_tokenizer(folder: Path) -> bool:
    """Returns whether `folder` has a vocabulary. Without one transformers makes an empty tokenizer of the model's
    type."""
    return any(path.is_file() for pattern in TOKENIZER_FILES for path in folder.glob(pattern))


def _locate(name: str, revision: str | None, options: LoadOptions) -> Source:
    subfolder = options.extra.get("subfolder") or ""
    path = Path(name).expanduser()
    if path.is_dir():
        folder = path.resolve() / subfolder
        return Source(str(folder), None, folder, folder)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1
    if looks_local or path.exists():
        found = "a file" if path.exists() else "nothing"
        raise CheckpointError(
            f"{name!r} was asked for as a checkpoint folder; there is {found} at {path.absolute()}. Pass a folder with "
            "config.json and *.safetensors, or a hub id such as 'owner/model'"
        )
    small = [*SMALL_FILES, *(["*.py"] if options.trust_remote_code else [])]
    snapshot = _download(name, revision, options, small)
    folder = snapshot / subfolder
    return Source(name, snapshot.name, folder, folder)


def _download(name: str, revision: str | None, options: LoadOptions, patterns: list[str]) -> Path:
    """Fetches the files of a hub id that match `patterns` and returns the snapshot's folder, named by its commit."""
    subfolder = options.extra.get("subfolder")
    # A pattern's * matches slashes too; only files of the top folder are wanted.
    allowed = [f"{subfolder}/{pattern}" for pattern in patterns] if subfolder else patterns
    ignored = None if subfolder else ["*/*"]
    hub: dict[str, Any] = {
        k: options.extra[k] for k in ("cache_dir", "force_download", "local_files_only") if k in options.extra
    }
    try:
        return Path(
            snapshot_download(
                name, revision=revision, token=options.token, allow_patterns=allowed, ignore_patterns=ignored, **hub
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(_download_problem(name, revision, error)) from error


def _download_problem(name: str, revision: str | None, error: Exception) -> str:
    asked = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
    if isinstance(error, RevisionNotFoundError):
        return f"{asked} was asked for; the repository has no such revision. Pass a branch, tag or commit that it has"
    if isinstance(error, GatedRepoError):
        return f"{asked} was asked for; its owner must grant access. Ask for it on its page, then pass token="
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{asked} was asked for; there is no such folder here and no such repository on the hub (or it is private). "
            "Check the name, or pass token="
        )
    if isinstance(error, HFValidationError):
        return f"{asked} was asked for; there is no such folder, and a hub id looks like 'owner/model'. Check the name"
    return (
        f"{asked} was asked for; there is no such folder, and the hub could not be read ({type(error).__name__}: {error}). "
        "Check the connection, or pass the path of a local copy"
    )


def _require_config(source: Source) -> None:
    if not (source.folder / "config.json").is_file():
        raise CheckpointError(
            f"{source.name} was asked for; it has no config.json. Pass a folder or id that save_pretrained has written"
        )


def _adapter_record(found: Source) -> dict[str, Any]:
    path = found.folder / ADAPTER_CONFIG
    recorded = read_adapter_config(path)
    if not recorded.get("base_model_name_or_path"):
        raise CheckpointError(
            f"{path} does not say which model the adapter belongs to (base_model_name_or_path). Load that model first, "
            "then the adapter with PEFT"
        )
    return recorded


def _base_name(base: str, adapter: Source) -> str:
    """Returns the base's name or path. A relative path may also be relative to the adapter's folder."""
    relative = adapter.folder / base
    return str(relative) if not Path(base).is_dir() and relative.is_dir() else base
