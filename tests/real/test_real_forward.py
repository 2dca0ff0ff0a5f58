"""Real weights: logits, loss, gradients and text are those of unmodified transformers."""

from typing import Any

import pytest
import torch
from real_kit import QUESTIONS, batch, ours, prompt_ids, stock, stock_tokenizer
from training_kit import apart, gradients_apart, gradients_of

pytestmark = pytest.mark.real
NEW = 16


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return ours(full_finetuning=True)


@pytest.fixture(scope="module")
def plain() -> Any:
    return stock()


def test_the_pad_token_grows_nothing(loaded: tuple[Any, Any]) -> None:
    """SmolLM2's pad token is its EOS; hasten takes another token that exists, or keeps EOS and masks by position."""
    model, tokenizer = loaded
    assert model.get_input_embeddings().weight.shape == (49152, 576)
    assert len(tokenizer) == 49152 and tokenizer.eos_token == "<|im_end|>"


def test_logits(loaded: tuple[Any, Any], plain: Any) -> None:
    inputs = {name: values for name, values in batch().items() if name != "labels"}
    with torch.no_grad():
        found, wanted = loaded[0].eval()(**inputs).logits[..., :49152], plain(**inputs).logits
    kept = inputs["attention_mask"].bool()
    assert torch.equal(found[kept], wanted[kept])


def test_loss_and_gradients(loaded: tuple[Any, Any], plain: Any) -> None:
    seen = []
    for model in (loaded[0], plain):
        model.train()
        model.zero_grad()
        loss = model(**batch(2)).loss
        loss.backward()
        seen.append((loss.detach()[None].double(), gradients_of(model)))
        model.zero_grad(set_to_none=True)
        model.eval()
    (found, gradients), (wanted, expected) = seen
    gradients = {name: g[:49152] if g.shape[0] > 49152 else g for name, g in gradients.items()}
    assert apart(found, wanted) < 1e-6
    assert gradients_apart(gradients, expected) < 2e-4


def answers(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuation of each prompt by itself, up to and including the first EOS."""
    found = []
    for prompt in prompts:
        with torch.no_grad():
            new = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
        found.append(new[: new.index(2) + 1] if 2 in new else new)
    return found


def test_greedy_text_alone_and_left_padded(loaded: tuple[Any, Any], plain: Any) -> None:
    model, tokenizer = loaded
    model.for_inference()
    prompts = [prompt_ids(tokenizer, question) for question, _ in QUESTIONS[:4]]
    wanted = answers(plain, prompts)
    assert "Paris" in tokenizer.decode(wanted[0])
    assert answers(model, prompts) == wanted
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**padded, max_new_tokens=NEW, do_sample=False)
    new = output[:, padded["input_ids"].shape[1] :].tolist()
    assert [ids[: len(one)] for ids, one in zip(new, wanted, strict=True)] == wanted
    assert all(set(ids[len(one) :]) <= {tokenizer.pad_token_id} for ids, one in zip(new, wanted, strict=True))


def test_chat_template(loaded: tuple[Any, Any]) -> None:
    tokenizer = stock_tokenizer()
    assert loaded[1].chat_template == tokenizer.chat_template
    for question, _ in QUESTIONS:
        ids = prompt_ids(loaded[1], question)
        assert ids == prompt_ids(tokenizer, question)
        assert tokenizer.decode(ids).endswith(f"user\n{question}<|im_end|>\n<|im_start|>assistant\n")
