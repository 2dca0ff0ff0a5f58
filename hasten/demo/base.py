"""The base model of the demo: a byte-level BPE tokenizer and a small Llama, both trained from scratch."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS, USER, ASSISTANT = SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class BaseSize:
    """Size and pretraining of the base model. block: tokens per sequence. batch: sequences per step."""

    hidden: int
    layers: int
    vocabulary: int
    steps: int
    block: int = 128
    batch: int = 8
    learning_rate: float = 3e-3

    def config(self) -> LlamaConfig:
        """Llama's proportions: attention heads of 64 channels, an MLP of 8/3 of the hidden size, tied embeddings."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=-(-self.hidden * 8 // 3 // 64) * 64,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 64,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=SPECIAL.index(PAD),
            bos_token_id=SPECIAL.index(BOS),
            eos_token_id=SPECIAL.index(EOS),
        )


def train_tokenizer(documents: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909). The chat template marks assistant tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[USER, ASSISTANT],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def pretrain(
    documents: Sequence[str],
    size: BaseSize,
    folder: Path,
    on_step: Callable[[int, float], None],
    seed: int = 3407,
) -> list[float]:
    """Trains tokenizer and model on `documents` and writes a standard bf16 checkpoint to `folder`.

    on_step: called with the step (from 1) and its loss, in nats per token. Returns the losses of all steps.
    """
    tokenizer = train_tokenizer(documents, size.vocabulary)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(size.config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.learning_rate, size.steps, pct_start=0.1)
    losses = []
    batches = _batches([tokenizer(text + EOS)["input_ids"] for text in documents], size, seed)
    for step, input_ids in zip(range(1, size.steps + 1), batches, strict=False):
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        on_step(step, losses[-1])
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def _batches(encoded: list[list[int]], size: BaseSize, seed: int) -> Iterator[torch.Tensor]:
    """Yields endless (batch, block) int64 batches: documents shuffled per epoch, concatenated, cut into sequences."""
    order = random.Random(seed)
    tokens: list[int] = []
    needed = size.batch * size.block
    while True:
        order.shuffle(encoded)
        for ids in encoded:
            tokens += ids
            if len(tokens) >= needed:
                yield torch.tensor(tokens[:needed]).view(size.batch, size.block)
                tokens = tokens[needed:]
