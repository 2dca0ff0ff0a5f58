"""Defines the errors for users. Their messages say what was asked, what was found, and what to do. All are
ValueErrors."""

from collections.abc import Sequence


class HastenError(ValueError):
    """Base of every error that hasten raises on purpose."""


class OptionError(HastenError):
    """One or more arguments cannot take effect. `problems` lists each, with what to do instead."""

    def __init__(self, call: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__(f"{call} cannot be done as asked ({count}):\n{lines}")


class CheckpointError(HastenError):
    """A checkpoint or adapter on disk is missing, corrupt, of another shape, or in an unsafe format."""


class TokenizerError(HastenError):
    """Tokenizer and model do not fit together, and no fix would be lossless."""


class InputError(HastenError):
    """An input of a model (length, mask, labels) is outside of what the model was loaded for."""


class LogitsNotComputedError(InputError, AttributeError):
    """The logits of a fused training loss were read. An AttributeError too, so that `hasattr(outputs, "logits")` is
    False and `getattr(outputs, "logits", default)` is the default."""


class DatasetError(HastenError):
    """A dataset cannot be read, is empty, or has every label masked."""


class TrainingError(HastenError):
    """A training run cannot continue or resume. The message names the step."""


class PatchError(HastenError):
    """Overlays cannot be applied to the model or removed from it; nothing was changed."""


class ContractError(PatchError):
    """An installed transformers class differs from what the family's data file records."""


class AccuracyError(HastenError):
    """A comparison with the reference failed. The message names the tensor and both errors."""


class ExportError(HastenError):
    """A model cannot be written; no partial model is left on disk."""


class MissingExtraError(HastenError, ImportError):
    """An optional dependency is missing. The message names the extra that installs it."""

    def __init__(self, wanted: str, package: str, extra: str) -> None:
        super().__init__(
            f"{wanted} needs {package}, which is not installed. Install it with: pip install 'hasten[{extra}]'"
        )
