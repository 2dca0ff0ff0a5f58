"""Code written for unsloth runs unchanged: `import unsloth` finds hasten, as `pymysql.install_as_MySQLdb()` does it."""

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
    "PatchDPOTrainer": "TRL's own DPOTrainer, which needs no patch; leave the call out",
    "PatchFastRL": "TRL's own GRPOTrainer, which needs no patch; leave the call out",
    "UnslothTrainer": "TRL's own SFTTrainer with optimizer parameter groups",
    "UnslothTrainingArguments": "hasten.sft_config(model, ...), or trl.SFTConfig",
    "unsloth_train": "trainer.train(), whose gradient accumulation is exact",
    "chat_templates": "the checkpoint's own chat template (tokenizer.apply_chat_template), and assistant_only_loss=True of "
    "trl.SFTConfig for training on responses only",
    "models": "the same classes at the top (from unsloth import FastLlamaModel)",
    "save": "model.save_pretrained_merged(folder, tokenizer)",
    "trainer": "TRL's own trainers",
}


class DropInError(HastenError, ImportError):
    """Code written for unsloth asks for something that hasten does not have, or has elsewhere."""


class _Unsloth(ModuleType):
    """The module. Its classes are hasten's, looked up when they are first used."""

    __version__ = hasten.__version__
    __all__ = [*CLASSES, "is_bf16_supported", "is_bfloat16_supported"]

    def __getattr__(self, name: str) -> Any:
        if name in CLASSES:
            return getattr(hasten, name)
        if name in ("is_bfloat16_supported", "is_bf16_supported"):
            return _is_bfloat16_supported
        raise AttributeError(f"module {NAME!r} (hasten) has no attribute {name!r}. {_instead(name)}")


class _Submodules(importlib.abc.MetaPathFinder):
    """Answers imports of names that the module does not have with what hasten has instead."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> None:
        """None for every other package. Raises DropInError for `unsloth.<name>`."""
        if fullname.startswith(f"{NAME}.") and isinstance(sys.modules.get(NAME), _Unsloth):
            name = fullname.split(".")[1]
            raise DropInError(f"{fullname} was imported; hasten stands in for {NAME}. {_instead(name)}")


def install_as_unsloth() -> ModuleType:
    """From now on `import unsloth` gives hasten's classes under unsloth's names. Returns that module.

    Calling it again changes nothing. Raises DropInError where unsloth itself was imported before.
    """
    present = sys.modules.get(NAME)
    if isinstance(present, _Unsloth):
        return present
    if present is not None:
        raise DropInError(
            f"install_as_unsloth() was called, but {NAME} is already imported, from "
            f"{getattr(present, '__file__', 'somewhere')}. Call it before the first import of {NAME}."
        )
    module = _Unsloth(NAME, "hasten under unsloth's names.")
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, loader=None, is_package=True)
    module.__path__ = []
    sys.modules[NAME] = module
    sys.meta_path.insert(0, _Submodules())
    return module


def run(path: str | Path, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Runs a script written for unsloth as `python path *argv` would, and returns its global names.

    Raises InputError if there is no such file, and whatever the script raises.
    """
    script = Path(path)
    if not script.is_file():
        raise InputError(f"{path} was asked to be run; there is no such file. Pass the path of a Python script.")
    install_as_unsloth()
    arguments, folders = sys.argv, sys.path
    sys.argv, sys.path = [str(path), *argv], [str(script.resolve().parent), *folders]
    try:
        return runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path = arguments, folders


def _is_bfloat16_supported() -> bool:
    """Whether to train in bf16 and not in fp16 here: on a GPU that has it, and on CPUs, of which none trains in fp16."""
    import torch

    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def _instead(name: str) -> str:
    if name in ELSEWHERE:
        return f"Instead of {name} it has {ELSEWHERE[name]}."
    return f"It has {', '.join(_Unsloth.__all__)}; see docs/api.md."
