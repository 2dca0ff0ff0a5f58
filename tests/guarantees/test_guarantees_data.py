"""Guarantees of what is trained on: tokens, masks, truncation, packing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_kit import CHATS, write_job, write_rows
from datasets import Dataset
from device_kit import DEVICE, GRADIENTS, LOGITS, ON_GPU
from guarantee_kit import IDS, PROMPTS, adapted, chats, load, losses, stock, trainer
from transformers import AutoTokenizer

from hasten import FastLanguageModel, check_dataset
from hasten.errors import DatasetError
from hasten.testing import relative_error, save_tiny
from hasten.training.config import read_job
from hasten.training.job import run

SOLO = {"learning_rate": 5e-3, "lr_scheduler_type": "constant"}


def pad_is_eos(folder: Path) -> Path:
    """A checkpoint whose tokenizer pads with its EOS and has no other special token to spare."""
    save_tiny(folder, "llama", amplify=1.0, num_hidden_layers=2, tie_word_embeddings=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    return folder


def test_r04_left_padded_batches_continue_as_each_prompt_alone(llama: Path, gemma2: Path) -> None:
    """Greedy text of a ragged, left-padded batch is, token for token, that of each prompt alone; nothing of the tokenizer changes."""
    for folder in (llama, gemma2):
        model, tokenizer = load(folder)
        before = (vars(tokenizer).copy(), model.config.to_dict(), model.generation_config.to_dict())
        plain = stock(folder)
        alone = [
            plain.generate(row[None], max_new_tokens=8, do_sample=False)[0, len(row) :].tolist() for row in PROMPTS
        ]
        alone = [ids[: ids.index(2) + 1] if 2 in ids else ids for ids in alone]
        for count in (1, 2, 4, 8):
            for pad in (0, 2):
                width = max(map(len, PROMPTS[:count]))
                ids = torch.stack([torch.cat([row.new_full((width - len(row),), pad), row]) for row in PROMPTS[:count]])
                mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in PROMPTS[:count]]).to(
                    DEVICE
                )
                found = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=pad)
                new = found[:, width:].tolist()
                assert [row[: len(one)] for row, one in zip(new, alone, strict=False)] == alone[:count]
        assert (vars(tokenizer), model.config.to_dict(), model.generation_config.to_dict()) == before


def test_r05_eos_is_learned_where_it_is_also_the_pad_token(tmp_path: Path) -> None:
    """Padding is masked by position: the EOS that ends an answer has a label even where pad and EOS are one token, and is learned."""
    model, tokenizer = load(pad_is_eos(tmp_path / "base"), fix_tokenizer=False, full_finetuning=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    data = Dataset.from_list([{"prompt": f"{i}", "completion": "ab" * (1 + i // 5)} for i in range(10)])
    done = trainer(model, tokenizer, data, tmp_path, max_steps=40, per_device_train_batch_size=10, **SOLO)
    batch = next(iter(done.get_train_dataloader()))
    real = batch["attention_mask"].bool() if "attention_mask" in batch else batch["labels"] != -100
    ends = real.sum(dim=1) - 1
    assert bool((batch["labels"].gather(1, ends[:, None]) == 2).all()), "the EOS of each example has a label"
    assert (
        bool((batch["labels"][~real] == -100).all())
        and bool((batch["input_ids"][~real] == 2).all())
        and bool((~real).any())
    )
    done.train()
    model.for_inference()
    for prompt, wanted in (("4", "ab<|eos|>"), ("7", "abab<|eos|>")):
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(answer) == wanted


@pytest.mark.parametrize("family", ["llama", "no BOS"])
def test_r07_one_bos_in_training_and_inference(family: str, plain: Path, tmp_path: Path) -> None:
    """Training and inference tokenise a text alike, with exactly one BOS, or none if the tokenizer adds none."""
    folder = plain
    if family == "no BOS":
        folder = save_tiny(tmp_path / "base", "llama", num_hidden_layers=2)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.backend_tokenizer.post_processor = None
        tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
        tokenizer.save_pretrained(folder)
    model, tokenizer = adapted(folder)
    wanted = 1 if family == "llama" else 0
    texts = Dataset.from_list([{"text": "some text"}, {"text": "more"}])
    for data in (texts, chats(2)):
        for row, source in zip(trainer(model, tokenizer, data, tmp_path).train_dataset, data, strict=True):
            ids = list(row["input_ids"])
            assert ids.count(1) == wanted and (ids[0] == 1) == bool(wanted)
            if "text" in source:
                assert ids == [*tokenizer(source["text"]).input_ids, 2]
            else:
                assert ids == tokenizer.apply_chat_template(source["messages"], return_dict=True)["input_ids"]


def test_r08_labels_are_exactly_the_assistant_turns(plain: Path, tmp_path: Path) -> None:
    """With `assistant_only_loss` the labels are the assistant's turns; masked examples are counted, and without any label nothing trains."""
    model, tokenizer = adapted(plain)
    made = trainer(model, tokenizer, chats(), tmp_path, assistant_only_loss=True, shuffle_dataset=False)
    for index, chat in enumerate(chats()):
        row = made.data_collator([made.train_dataset[index]])
        kept = row["input_ids"][0][row["labels"][0] != -100]
        said = "".join(turn["content"] + "<|end|>" for turn in chat["messages"] if turn["role"] == "assistant")
        assert tokenizer.decode(kept) == said
    silent = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    counts = check_dataset(Dataset.from_list([silent, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]))
    assert (counts.masked, counts.labels) == (1, 2)
    late = {"input_ids": list(range(6, 30)), "labels": [-100] * 20 + list(range(26, 30))}
    for data in (Dataset.from_list([silent] * 3), Dataset.from_list([late] * 3)):
        with pytest.raises(DatasetError, match="no label"):
            check_dataset(data, max_length=10)


@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("triton", marks=pytest.mark.full)])
@pytest.mark.parametrize("family", ["llama", "gemma2", pytest.param("cohere2", marks=pytest.mark.full)])
def test_r09_packed_documents_do_not_see_each_other(
    family: str, attention: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Documents packed into one sequence get the logits, losses and gradients that they get alone, on every attention backend."""
    if attention == "triton":
        request.getfixturevalue("kernels")
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if family == "cohere2" else {}
    folder = save_tiny(tmp_path, family, num_hidden_layers=2, **kinds)
    asked = "eager" if family == "gemma2" or attention == "triton" else attention
    model, _ = load(folder, attn_implementation=asked, full_finetuning=True)
    parts = [IDS[0, :7], IDS[1, :11], IDS[0, 8:]]
    packed = {
        "input_ids": torch.cat(parts)[None],
        "position_ids": torch.cat([torch.arange(len(p), device=DEVICE) for p in parts])[None],
    }

    def run_packed(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(**{**packed, "input_ids": ids}, use_cache=False).logits[0]

    found = run_packed(packed["input_ids"])
    alone = stock(folder, attn_implementation="eager")
    wanted = torch.cat([alone(part[None]).logits[0] for part in parts])
    if ON_GPU:
        assert relative_error(found, wanted) <= LOGITS
    else:
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=5e-5)
    other = packed["input_ids"].clone()
    other[0, :7] = IDS[1, 12:19]
    assert torch.equal(run_packed(other)[7:], found[7:]) and not torch.equal(run_packed(other)[:7], found[:7])
    starts = torch.tensor([0, 7, 18], device=DEVICE)
    labels = packed["input_ids"].index_fill(1, starts, -100)
    model.train()(**packed, labels=labels).loss.backward()
    sum((alone(p[None], labels=p[None]).loss * (len(p) - 1) for p in parts), torch.zeros(())).div(
        sum(map(len, parts)) - 3
    ).backward()
    theirs = {name: p.grad for name, p in alone.named_parameters()}
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, theirs[name]) < (GRADIENTS if ON_GPU else 1e-4), name


def test_r20_nothing_is_truncated_in_silence(tmp_path: Path) -> None:
    """Examples that are too long are cut, dropped or refused as `too_long` says, and the result counts examples and tokens lost."""
    long = {"messages": [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "y" * 60}]}
    short = CHATS[:6]
    found: dict[str, Any] = {}
    for policy in ("truncate", "drop"):
        folder = tmp_path / policy
        folder.mkdir()
        write_rows(folder / "rows.jsonl", [*short, long])
        job = write_job(folder, data={"too_long": policy}, train={"max_steps": 1, "assistant_only_loss": False})
        found[policy] = run(read_job(job), FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model)
    lost = 1 + 1 + 90 + 1 + 1 + 60 + 1 - 64
    for policy, dropped in (("truncate", 0), ("drop", 1)):
        counts = found[policy].counts
        assert (counts.examples, counts.truncated, counts.lost) == (7, 1, lost)
        assert found[policy].dropped == dropped
        assert f"1 examples truncated ({lost} tokens lost)" in str(counts)
    write_rows(tmp_path / "rows.jsonl", [*short, long])
    job = read_job(write_job(tmp_path, data={"too_long": "error"}))
    with pytest.raises(DatasetError, match=f"1 of 7 examples.*{lost} tokens too many"):
        run(job, FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model)


def test_r03_the_loss_does_not_depend_on_the_split(plain: Path, tmp_path: Path) -> None:
    """Eight examples give the same loss and step, whatever batch size times gradient accumulation they are split into."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(6, 200, (n,), generator=generator).tolist() for n in (40, 4, 30, 5, 20, 6, 10, 7)]
    data = Dataset.from_list([{"input_ids": i, "labels": [-100] * (len(i) // 3) + i[len(i) // 3 :]} for i in ids])
    seen = []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        model, tokenizer = adapted(plain)
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        done = trainer(model, tokenizer, data, tmp_path, learning_rate=1.0, **split)
        done.train()
        step = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_B" in n])
        seen.append((losses(done), step))  # B starts at zero and the optimizer is SGD: the step is the gradient
    for loss, step in seen[1:]:
        torch.testing.assert_close(loss, seen[0][0], rtol=1e-5, atol=0)
        assert float((step - seen[0][1]).norm() / seen[0][1].norm()) < 1e-5
