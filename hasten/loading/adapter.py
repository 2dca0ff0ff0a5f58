"""Attaches a saved adapter to a model, completely or not at all.

PEFT loads the tensors that fit and warns about the rest, so a renamed key leaves a model half trained. Here the tensors
in the file's header are compared with those that PEFT would save for this model and config, before the model is
changed.
"""

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from hasten.errors import CheckpointError
from hasten.loading.adapter_files import check_adapter_files
from hasten.loading.foreign import parsing
from hasten.loading.vocabulary import seeded
from hasten.patching.contract import stock_class
from hasten.state import causal_lm_of

log = logging.getLogger(__name__)

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Shapes = dict[str, tuple[int, ...]]


def attach(
    model: nn.Module,
    folder_or_id: str | Path,
    trainable: bool = True,
    token: str | bool | None = None,
    revision: str | None = None,
) -> PeftModel:
    """Returns PEFT's model around the causal LM `model`, with the adapter of a folder or hub repository.

    trainable: False freezes the adapter and sets eval mode. Raises CheckpointError, with the model unchanged, for
    missing, unexpected or misshapen tensors (all are listed), for a pickled adapter, and where there is no adapter.
    Another base than the one that the adapter was trained on only gives a warning: it may be a copy under another name.
    """
    causal_lm = causal_lm_of(model)
    if causal_lm is not model or getattr(model, "peft_config", None):
        raise CheckpointError(
            f"{folder_or_id} cannot be attached: the model already has an adapter; load the base again"
        )
    folder = fetch(str(folder_or_id), token, revision)
    check_adapter_files(folder)
    config = check_fits(causal_lm, folder)
    _warn_of_other_base(causal_lm, config)
    # PEFT initialises an adapter at random before it reads the weights; the caller's generators must not change.
    with seeded(0), parsing(f"The adapter in {folder}", CheckpointError, "Load the base model again, without it"):
        peft_model = PeftModel.from_pretrained(causal_lm, str(folder), is_trainable=trainable, config=config)
    # PEFT drops this field on reading; an export needs it, since such an adapter only fits the quantised base.
    repaired = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("loftq_config")
    if repaired:
        peft_model.peft_config["default"].loftq_config = repaired  # pyright: ignore[reportAttributeAccessIssue]
    return peft_model


def check_fits(causal_lm: Any, folder: Path) -> PeftConfig:
    """Returns the adapter's config once its tensors are those of an adapter of this model, which may be on the meta device.

    Raises CheckpointError with every missing, unexpected or misshapen tensor.
    """
    config = _read_config(folder)
    problems = _compare(_read_header(folder / WEIGHTS), *_expected(causal_lm, config))
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(f"the adapter in {folder} does not fit this model, nothing was attached:\n  {listed}")
    return config


def fetch(source: str, token: str | bool | None, revision: str | None) -> Path:
    """Returns the local folder with config and weights. No other file is fetched."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            path = hf_hub_download(source, CONFIG, revision=revision, token=token)
            hf_hub_download(source, WEIGHTS, revision=revision, token=token)
        except (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
            raise CheckpointError(
                f"{source!r} is not a folder, and {CONFIG} with {WEIGHTS} could not be fetched from the hub ({error}). Pass a "
                f"folder or a hub id that has both; pickled adapters ({PICKLE}) are not read, since loading one can run code"
            ) from error
        return Path(path).parent
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).is_file():
            raise CheckpointError(
                f"{folder} has its adapter as a pickle ({PICKLE}), and loading one can run code. If you trust it, load "
                "it with PEFT and save it again, which writes safetensors"
            )
        raise CheckpointError(f"{folder} has no {WEIGHTS}, so it is not an adapter; pass the folder that has it")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has {WEIGHTS} but no {CONFIG}; copy both files")
    return folder


def _read_config(folder: Path) -> PeftConfig:
    with parsing(str(folder / CONFIG), CheckpointError, "Save the adapter again"), warnings.catch_warnings():
        # `attach` restores the field.
        warnings.filterwarnings("ignore", "`loftq_config` specified but will be ignored", UserWarning)
        return PeftConfig.from_pretrained(str(folder))


def _read_header(path: Path) -> Shapes:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or download it again") from error


def _expected(model: Any, config: PeftConfig) -> tuple[Shapes, Shapes]:
    """Returns (tensors that PEFT saves for this adapter, tensors that it may add when the vocabulary was resized).

    They are read from a copy of the architecture on the meta device, wrapped by PEFT as the model will be.
    """
    config = copy.deepcopy(config)
    if getattr(config, "init_lora_weights", None) not in (
        None,
        "mica",
    ):  # a variant of LoRA, not only an initialisation
        config.init_lora_weights = False  # pyright: ignore[reportAttributeAccessIssue]
    with torch.device("meta"):
        bare: Any = stock_class(model)(copy.deepcopy(model.config))
        bare.tie_weights()
        # PEFT raises for a target that matches no module, a field out of range, a regular expression that is none, ...
        with parsing(f"the adapter's config for {type(model).__name__}", CheckpointError, "Save the adapter again"):
            wrapped = get_peft_model(bare, config)
    required = _shapes(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    both = _shapes(get_peft_model_state_dict(wrapped, save_embedding_layers=True))
    return required, {name: shape for name, shape in both.items() if name not in required}


def _shapes(tensors: dict[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _compare(found: Shapes, required: Shapes, optional: Shapes) -> list[str]:
    known = {**optional, **required}
    problems = [f"missing: {name} {list(required[name])}" for name in required if name not in found]
    problems += [f"unexpected: {name} {list(found[name])}" for name in found if name not in known]
    for name, shape in found.items():
        if name in known and shape != known[name]:
            hint = " (load the base with resize_model_vocab of the first number)" if name in optional else ""
            problems.append(f"wrong shape: {name} is {list(shape)}, the model needs {list(known[name])}{hint}")
    return problems


def _warn_of_other_base(model: Any, config: PeftConfig) -> None:
    trained_on, loaded = config.base_model_name_or_path or "", model.config._name_or_path or ""
    if not trained_on or not loaded:
        return
    same = Path(trained_on).resolve() == Path(loaded).resolve() if Path(loaded).exists() else trained_on == loaded
    if not same:
        log.warning("the adapter was trained on %s and is attached to %s", trained_on, loaded)
