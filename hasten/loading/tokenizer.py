"""Fixes a tokenizer (`fix_tokenizer=True`): a pad token of its own, ids that agree with the model, right padding.

`model_max_length` is not changed: set to `max_seq_length` it would let `truncation=True` cut sequences silently.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from hasten.errors import TokenizerError
from hasten.loading.resolve import TOKENIZER_FILES, has_tokenizer

# In order of preference. Reserved tokens occur in no text that the model was trained on.
PAD_NAMES = (
    r"<\|finetune_right_pad_id\|>",
    r"(<\|?|\[)(?i:pad)(ding|_token)?(\|?>|\])",
    r"<\|?reserved_special_token_\d+\|?>",
    r"(<\|?|\[)(reserved|unused|extra|dummy)[_-]?(token)?[_-]?\d+(\|?>|\])",
    r"<\|(fim|vision)_pad\|>",
)
NEW_PAD = ("<|pad|>", "<|hasten_pad|>")


@dataclass
class TokenizerPlan:
    """pad: the token to pad with (None = as it is), is_new: not in the vocabulary yet. rows_needed: after the fixes."""

    pad: str | None = None
    is_new: bool = False
    rows_needed: int = 0
    notes: list[str] = field(default_factory=list)


def read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Returns the tokenizer in `folder`, without network access. Raises TokenizerError if there is none or it cannot be
    read."""
    if not has_tokenizer(folder) and not trust_remote_code:
        raise TokenizerError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}). Save the model's tokenizer there"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TokenizerError(
            f"The tokenizer in {folder} cannot be read ({type(error).__name__}: {error}). Save the model's own there again"
        ) from error


def rows_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns one more than the largest id that the tokenizer can give."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def as_ids(value: Any) -> list[int]:
    """Returns a token id field (an int, a list of ints or None) as a list."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def generation_eos_ids(folder: Path) -> list[int]:
    """Returns the ids at which the checkpoint's own generation config stops; none where it has no such file."""
    if not (folder / "generation_config.json").is_file():
        return []
    return as_ids(GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id)


def plan_fixes(
    tokenizer: PreTrainedTokenizerBase, rows: int, eos_ids: Iterable[int], pad_id: int | None
) -> TokenizerPlan:
    """Plans the fixes that are needed. Does not change the tokenizer.

    rows: of the model's embedding. eos_ids: all ids at which the model stops. pad_id: the config's.
    """
    plan = TokenizerPlan(rows_needed=rows_needed(tokenizer))
    taken = {*as_ids(tokenizer.eos_token_id), *as_ids(tokenizer.bos_token_id), *eos_ids}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in taken:
        was = "none" if tokenizer.pad_token is None else f"{tokenizer.pad_token}, which is also BOS or EOS"
        plan.pad = _spare_token(tokenizer, rows, taken, pad_id)
        if plan.pad is None:
            plan.pad = next(name for name in NEW_PAD if name not in tokenizer.get_vocab())
            plan.is_new = True
            plan.rows_needed += 1
        plan.notes.append(f"pad token: {plan.pad} ({'new' if plan.is_new else 'in the vocabulary'}); it was {was}")
    if tokenizer.padding_side != "right":
        plan.notes.append(f"padding side: right, for training; it was {tokenizer.padding_side}")
    plan.notes += _template_notes(tokenizer)
    return plan


def _spare_token(tokenizer: PreTrainedTokenizerBase, rows: int, taken: set[Any], pad_id: int | None) -> str | None:
    """Returns a token that no text uses: the config's own pad token, else a reserved name."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    vocabulary = tokenizer.get_vocab()
    free = {
        token: index
        for token, index in vocabulary.items()
        if index < rows and index not in taken and token not in template and token != tokenizer.unk_token
    }
    marked = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    for token in free:
        if pad_id is not None and free[token] == pad_id and token in marked:
            return token
    for pattern in PAD_NAMES:
        matching = [token for token in free if re.fullmatch(pattern, token)]
        if matching:
            return min(matching, key=lambda token: free[token])
    return None


def _template_notes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if not getattr(tokenizer, "chat_template", None):
        return []
    question = [{"role": "user", "content": "x"}]
    try:
        asked, plain = (
            tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=prompt)
            for prompt in (True, False)
        )
    except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
        return [f"chat template: cannot render a single user turn ({type(error).__name__}: {error})"]
    if asked != plain:
        return []
    return ["chat template: add_generation_prompt adds nothing, so generation does not start with the assistant's turn"]


def apply_fixes(tokenizer: PreTrainedTokenizerBase, plan: TokenizerPlan) -> None:
    """Applies the plan to the tokenizer. A token of the vocabulary keeps its id; a new one comes last."""
    if plan.pad is not None:
        if plan.is_new:
            tokenizer.add_special_tokens({"pad_token": plan.pad})
        else:
            tokenizer.pad_token = plan.pad
    tokenizer.padding_side = "right"


def agree(tokenizer: PreTrainedTokenizerBase, model: Any) -> list[str]:
    """Sets pad, eos and bos ids of config and generation config to the tokenizer's, and returns what changed.

    A list of eos ids (models that stop at several tokens) is kept, with the tokenizer's added. Where the tokenizer
    has no such token, the model keeps its own.
    """
    notes = []
    text = model.config.get_text_config()
    for holder, label in ((text, "config"), (model.generation_config, "generation config")):
        if holder is None:
            continue
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            ours, theirs = getattr(tokenizer, name), getattr(holder, name, None)
            if ours is None or ours == theirs or (isinstance(theirs, list) and ours in theirs):
                continue
            keeps = name == "eos_token_id" and theirs is not None and (isinstance(theirs, list) or holder is not text)
            new = [ours, *(theirs if isinstance(theirs, list) else [theirs])] if keeps else ours
            setattr(holder, name, new)
            notes.append(f"{label}: {name} is {new}, as the tokenizer's; it was {theirs}")
    return notes
