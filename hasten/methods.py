"""Methods that a hasten model has beyond transformers' and PEFT's own. Mixed into the instance's class when it is patched."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.inference import for_inference, generate
from hasten.overlays import Overlay
from hasten.state import state_of
from hasten.training.modes import for_training

if TYPE_CHECKING:
    from hasten.export import Exported


class SharedMethods:
    """What the causal LM and the PeftModel around it share."""

    def for_inference(self) -> Any:
        """Evaluation mode, caches on, checkpointing off. Returns the model."""
        return for_inference(self)  # pyright: ignore[reportArgumentType]

    def for_training(self) -> Any:
        """Training mode, as it was before `for_inference`. Returns the model."""
        return for_training(self)  # pyright: ignore[reportArgumentType]

    def save_pretrained_merged(
        self, save_directory: str | Path, tokenizer: Any = None, save_method: str = "merged_16bit", **kwargs: Any
    ) -> "Exported":
        """Writes the model with its adapter merged in. save_method: "merged_16bit", "merged_4bit" or "lora".

        Raises ExportError, with nothing left behind that looks like a model.
        """
        from hasten.export import save_merged

        return save_merged(self, save_directory, tokenizer, save_method, **kwargs)  # pyright: ignore[reportArgumentType]

    def push_to_hub_merged(
        self, repo_id: str, tokenizer: Any = None, save_method: str = "merged_16bit", **kwargs: Any
    ) -> Any:
        """As `save_pretrained_merged`, into a hub repository. kwargs: token, private, revision."""
        from hasten.export import push_to_hub_merged

        return push_to_hub_merged(self, repo_id, tokenizer, save_method, **kwargs)  # pyright: ignore[reportArgumentType]


class CausalLMMethods(SharedMethods):
    """For the causal LM itself."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, for left- or right-padded rows alike. Raises InputError for rows that are too long."""
        return generate(self, super().generate, *args, **kwargs)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


class PeftMethods(SharedMethods, Overlay):
    """For the PeftModel. Keeps the dtypes in which its weights train, whatever a trainer casts them to.

    TRL's trainers cast every trained weight of a quantised model to bf16 on construction, whose steps lose small updates.
    """

    runs = "adapter"

    def train(self, mode: bool = True) -> Any:
        """As torch's. Entering training gives trained weights their dtypes back."""
        super().train(mode)
        if mode:
            self._keep_dtypes()
        return self

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, into weights of their own dtypes: a trainer resumes with it before it enters training."""
        self._keep_dtypes()
        return super().load_adapter(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _keep_dtypes(self) -> None:
        """Back to the dtypes that `get_peft_model` or loading promised."""
        promised = state_of(self).trained_dtypes
        for name, parameter in self.named_parameters():
            dtype = promised.get(name, parameter.dtype)
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
