"""Fixes a tokenizer (`fix_tokenizer=True`): a pad token of its own, ids that agree with the model, right padding.

The pad token is always one of the vocabulary: a new one would need a new row of embedding and head, and an adapter that
carries both matrices fits no base.

`model_max_length` is not changed: set to `max_seq_length` it would let `truncation=True` cut sequences silently.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hasten.errors import TokenizerError
from hasten.loading.config_file import read_generation_config
from hasten.loading.foreign import parsing
from hasten.loading.resolve import TOKENIZER_FILES, has_tokenizer
from hasten.loading.template import template_notes
from hasten.loading.tokenizer_files import check_tokenizer_files

# In order of preference. Reserved tokens occur in no text that the model was trained on.
PAD_NAME = r"(<\|?|\[)(?i:pad)(ding|_token)?(\|?>|\])"
SPARE_NAMES = (
    r"<\|finetune_right_pad_id\|>",
    PAD_NAME,
    r"<\|?reserved_special_token_\d+\|?>",
    r"(<\|?|\[)(?i:(reserved|unused|extra|dummy|placeholder|filler|spare|special|control)[a-z_-]*\d+)(\|?>|\])",
    r"<\|(fim|vision)_pad\|>",
    r"<\|end_?of_?text\|>",  # of the pretraining, where a chat model stops at another token
)


@dataclass
class TokenizerPlan:
    """pad: the token to pad with (None = as it is). rows_needed: of the embedding, for every id that can occur."""

    pad: str | None = None
    rows_needed: int = 0
    notes: list[str] = field(default_factory=list)


def read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Returns the tokenizer in `folder`, without network access. Raises TokenizerError if there is none or it cannot be
    read."""
    if not has_tokenizer(folder) and not trust_remote_code:
        raise TokenizerError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}). Save the model's tokenizer there"
        )
    check_tokenizer_files(folder)
    with parsing(f"The tokenizer in {folder}", TokenizerError, "Save the model's own there again"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)


def rows_needed(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns one more than the largest id that the tokenizer can give."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def as_ids(value: Any) -> list[int]:
    """Returns a token id field (an int, a list of ints or None) as a list."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def generation_eos_ids(folder: Path) -> list[int]:
    """Returns the ids at which the checkpoint's own generation config stops; none where it has no such file."""
    found = read_generation_config(folder)
    return [] if found is None else as_ids(found.eos_token_id)


def plan_fixes(
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    eos_ids: Iterable[int],
    pad_id: int | None,
    pad_may_grow: bool = False,
) -> TokenizerPlan:
    """Plans the fixes that are needed. Does not change the tokenizer.

    rows: of the model's embedding. eos_ids: all ids at which the model stops. pad_id: the config's. pad_may_grow: the
    tokenizer belongs to an adapter, which was trained with the rows that it needs.
    """
    needed = rows_needed(tokenizer) if pad_may_grow else _rows_without_padding(tokenizer, rows)
    plan = TokenizerPlan(rows_needed=needed)
    taken = {*as_ids(tokenizer.eos_token_id), *as_ids(tokenizer.bos_token_id), *eos_ids}
    own: Any = tokenizer.pad_token_id
    if own is None or own in taken or own >= max(rows, needed):
        pad, kind = _find_pad(tokenizer, rows, taken, pad_id)
        plan.pad = pad if pad != tokenizer.pad_token else None
        plan.notes.append(f"pad token: {pad} ({kind}); it was {_describe_pad(tokenizer, max(rows, needed))}")
    if tokenizer.padding_side != "right":
        plan.notes.append(f"padding side: right, for training; it was {tokenizer.padding_side}")
    plan.notes += template_notes(tokenizer)
    return plan


def _rows_without_padding(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """Returns `rows_needed`, but for pad tokens beyond the model's `rows`: they have no row, and get none."""
    needed = [
        index + 1
        for token, index in tokenizer.get_vocab().items()
        if index < rows or not (token == tokenizer.pad_token or re.fullmatch(PAD_NAME, token))
    ]
    return max(needed, default=0)


def _describe_pad(tokenizer: Any, rows: int) -> str:
    if tokenizer.pad_token is None:
        return "none"
    beyond = tokenizer.pad_token_id >= rows
    why = f"whose id {tokenizer.pad_token_id} has no row of the embedding" if beyond else "which is also BOS or EOS"
    return f"{tokenizer.pad_token}, {why}"


def _find_pad(tokenizer: Any, rows: int, taken: set[Any], pad_id: int | None) -> tuple[str | None, str]:
    """Returns (the token to pad with, what it is): one to spare, else the unknown token, else EOS."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    spare = _spare_token(tokenizer, rows, taken, pad_id)
    if spare is not None:
        return spare, "in the vocabulary"
    unknown, index = tokenizer.unk_token, tokenizer.unk_token_id
    if unknown is not None and index is not None and index < rows and index not in taken and unknown not in template:
        return str(unknown), "the unknown token, as no reserved one is in the vocabulary"
    by_position = (
        "as no other token can be spared; labels must be masked by position, as TRL's collators do, and not by id, as "
        "transformers' DataCollatorForLanguageModeling does"
    )
    if tokenizer.eos_token is not None and tokenizer.eos_token_id < rows:
        return str(tokenizer.eos_token), f"EOS, {by_position}"
    own = tokenizer.pad_token if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < rows else None
    return own, f"the tokenizer has no EOS; {by_position}"


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
    for pattern in SPARE_NAMES:
        matching = [token for token in free if re.fullmatch(pattern, token)]
        if matching:
            return min(matching, key=lambda token: free[token])
    return None


def apply_fixes(tokenizer: PreTrainedTokenizerBase, plan: TokenizerPlan) -> None:
    """Applies the plan to the tokenizer. Every token keeps its id."""
    if plan.pad is not None:
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
