"""Errors for users: what was asked, what was found, what to do. All are ValueErrors, so a caller's own handling works."""

from collections.abc import Sequence


class HastenError(ValueError):
    """Base of every error that hasten raises on purpose."""


class OptionError(HastenError):
    """One or more arguments cannot be honoured. `problems` lists every one found, each with what to do instead."""

    def __init__(self, call: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__(f"{call} cannot be done as asked ({count}):\n{lines}")


class CheckpointError(HastenError):
    """A checkpoint or adapter on disk is missing, corrupt, of another shape, or in an unsafe format."""


class TokenizerError(HastenError):
    """Tokenizer and model disagree in a way that cannot be mended without losing something."""


class InputError(HastenError):
    """What was given to a model (length, mask, labels) is outside of what it was loaded for."""


class DatasetError(HastenError):
    """A dataset has nothing to learn from: empty, or every label masked."""


class TrainingError(HastenError):
    """A training run cannot go on, or cannot be taken up again. The message names the step."""


class PatchError(HastenError):
    """The model is not in a state in which overlays can be put on or taken off; nothing was changed."""


class ContractError(PatchError):
    """An installed transformers class does not look as the family's data file records it."""


class AccuracyError(HastenError):
    """A comparison with the reference failed. The message names the tensor and both errors."""


class ExportError(HastenError):
    """A model could not be written; nothing that looks like a finished model was left behind."""


class MissingExtraError(HastenError, ImportError):
    """An optional dependency is needed for what was asked. The message names the extra that installs it."""

    def __init__(self, wanted: str, package: str, extra: str) -> None:
        super().__init__(
            f"{wanted} needs {package}, which is not installed. Install it with: pip install 'hasten[{extra}]'"
        )
