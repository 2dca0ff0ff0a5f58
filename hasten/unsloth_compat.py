"""Runs code written for unsloth: `import unsloth` finds hasten, the idiom of `pymysql.install_as_MySQLdb()`."""

import importlib.abc
import importlib.machinery
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import hasten
from hasten.errors import HastenError, InputError

NAME = "unsloth"
CLASSES = tuple(name for name in hasten.__all__ if name.startswith("Fast"))
ELSEWHERE = {
    "FastModel": "FastLanguageModel, which loads every causal language model",
    "FastVisionModel": "FastLanguageModel, for the text part only",
    "PatchDPOTrainer": "TRL's own DPOTrainer, which needs no patch; remove the call",
    "PatchFastRL": "TRL's own GRPOTrainer, which needs no patch; remove the call",
    "UnslothTrainer": "TRL's own SFTTrainer with optimizer parameter groups",
    "UnslothTrainingArguments": "hasten.sft_config(model, ...), or trl.SFTConfig",
    "unsloth_train": "trainer.train(), whose gradient accumulation is exact",
    "chat_templates": "the checkpoint's own chat template (tokenizer.apply_chat_template), and assistant_only_loss=True of "
    "trl.SFTConfig for training on responses only",
    "models": "the same classes at top level (from unsloth import FastLlamaModel)",
    "save": "model.save_pretrained_merged(folder, tokenizer)",
    "trainer": "TRL's own trainers",
}


class DropInError(HastenError, ImportError):
    """Code written for unsloth imports a name that hasten does not have, or has under another name."""


class _Unsloth(ModuleType):
    """The module `unsloth`. Its classes are hasten's, imported at first use."""

    __version__ = hasten.__version__
    __all__ = [*CLASSES, "is_bf16_supported", "is_bfloat16_supported"]

    def __getattr__(self, name: str) -> Any:
        if name in CLASSES:
            return getattr(hasten, name)
        if name in ("is_bfloat16_supported", "is_bf16_supported"):
            return _is_bfloat16_supported
        raise AttributeError(f"module {NAME!r} (hasten) has no attribute {name!r}. {_instead(name)}")


class _Submodules(importlib.abc.MetaPathFinder):
    """Raises for imports of submodules, with what hasten has instead."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> None:
        """Returns None for every other package. Raises DropInError for `unsloth.<name>`."""
        if fullname.startswith(f"{NAME}.") and isinstance(sys.modules.get(NAME), _Unsloth):
            name = fullname.split(".")[1]
            raise DropInError(f"{fullname} was imported, but hasten is installed as {NAME}. {_instead(name)}")


def install_as_unsloth() -> ModuleType:
    """Makes `import unsloth` return a module with hasten's classes under unsloth's names. Returns that module.

    A second call changes nothing. Raises DropInError if unsloth itself is already imported.
    """
    present = sys.modules.get(NAME)
    if isinstance(present, _Unsloth):
        return present
    if present is not None:
        raise DropInError(
            f"install_as_unsloth() was called, but {NAME} is already imported, from "
            f"{getattr(present, '__file__', 'an unknown file')}. Call it before the first import of {NAME}."
        )
    module = _Unsloth(NAME, "hasten under unsloth's names.")
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, loader=None, is_package=True)
    module.__path__ = []
    sys.modules[NAME] = module
    sys.meta_path.insert(0, _Submodules())
    return module


def run(path: str | Path, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Runs a script written for unsloth as `python path *argv` would, and returns its globals.

    Raises InputError if the file does not exist, and any error of the script.
    """
    script = Path(path)
    if not script.is_file():
        raise InputError(f"hasten run was given {path}, which does not exist. Pass the path of a Python script.")
    install_as_unsloth()
    arguments, folders = sys.argv, sys.path
    sys.argv, sys.path = [str(path), *argv], [str(script.resolve().parent), *folders]
    try:
        return runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path = arguments, folders


def _is_bfloat16_supported() -> bool:
    """Returns whether to train in bf16 rather than fp16: on GPUs that support it, and on CPUs, which do not train in
    fp16."""
    import torch

    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def _instead(name: str) -> str:
    if name in ELSEWHERE:
        return f"Instead of {name} it has {ELSEWHERE[name]}."
    return f"It has {', '.join(_Unsloth.__all__)}; see docs/api.md."
