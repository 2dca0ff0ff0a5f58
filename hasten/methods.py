"""Defines user-facing methods of a hasten model, mixed into the class of the causal LM and of its PeftModel."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hasten.inference import engine_of, for_inference
from hasten.overlays import Overlay
from hasten.overlays.cache_name import with_cache_name
from hasten.state import GenerateCall, find_state, state_of
from hasten.training.modes import for_training

if TYPE_CHECKING:
    from hasten.export import Exported


class SharedMethods:
    """Methods of both the causal LM and the PeftModel."""

    def for_inference(self) -> Any:
        """Sets evaluation mode, KV caches on, activation checkpointing off. Returns the model."""
        return for_inference(self)  # pyright: ignore[reportArgumentType]

    def for_training(self) -> Any:
        """Sets training mode, with the checkpointing that was on before `for_inference`. Returns the model."""
        return for_training(self)  # pyright: ignore[reportArgumentType]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Applies `to`, `half`, `float`, ... as torch does. Weights then train in the dtype that the caller chose."""
        moved = super()._apply(fn, recurse)  # pyright: ignore[reportAttributeAccessIssue]
        state = find_state(self)  # pyright: ignore[reportArgumentType]
        if state is not None:
            dtypes = {old: fn(torch.empty(0, dtype=old)).dtype for old in set(state.trained_dtypes.values())}
            state.trained_dtypes = {name: dtypes[old] for name, old in state.trained_dtypes.items()}
        return moved

    def save_pretrained_merged(
        self, save_directory: str | Path, tokenizer: Any = None, save_method: str = "merged_16bit", **kwargs: Any
    ) -> "Exported":
        """Writes the model with its adapter merged in. save_method: "merged_16bit", "merged_4bit" or "lora".

        Raises ExportError, and then leaves no partial model behind.
        """
        from hasten.export import save_merged

        return save_merged(self, save_directory, tokenizer, save_method, **kwargs)  # pyright: ignore[reportArgumentType]

    def push_to_hub_merged(
        self, repo_id: str, tokenizer: Any = None, save_method: str = "merged_16bit", **kwargs: Any
    ) -> Any:
        """Writes what `save_pretrained_merged` writes to a repository of the hub. kwargs: token, private, revision."""
        from hasten.export import push_to_hub_merged

        return push_to_hub_merged(self, repo_id, tokenizer, save_method, **kwargs)  # pyright: ignore[reportArgumentType]


class CausalLMMethods(SharedMethods):
    """Methods of the causal LM."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates as transformers' `generate` does, with the model's engine; takes left- and right-padded batches.

        Raises InputError for sequences longer than `max_seq_length`.
        """
        kwargs = with_cache_name(kwargs, "generate")
        call = GenerateCall(super().generate, args, kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return engine_of(self).generate(self, call)


class PeftMethods(SharedMethods, Overlay):
    """Methods of the PeftModel. Restores the dtypes in which its weights train after a trainer has cast them.

    TRL's trainers cast every trained weight of a quantised model to bf16 on construction, and bf16 loses small updates.
    """

    runs = "adapter"

    def train(self, mode: bool = True) -> Any:
        """Sets the mode as torch does; entering training mode casts trained weights back to their dtypes."""
        super().train(mode)
        if mode:
            self._keep_dtypes()
        return self

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Loads an adapter as PEFT does, after casting trained weights back: a trainer that resumes loads before it
        enters training mode."""
        self._keep_dtypes()
        return super().load_adapter(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _keep_dtypes(self) -> None:
        """Casts trained weights back to the dtypes that loading or `get_peft_model` gave them."""
        dtypes = state_of(self).trained_dtypes
        for name, parameter in self.named_parameters():
            dtype = dtypes.get(name, parameter.dtype)
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
