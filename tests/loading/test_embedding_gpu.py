"""`offload_embedding` on a GPU: the same numbers as without it, less memory, no waiting, whatever moves the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel
from trl import SFTTrainer

from hasten import FastLanguageModel, sft_config
from hasten.errors import OptionError
from hasten.loading.embedding import HostEmbedding
from hasten.ops.host_rows import host_rows
from hasten.testing import save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
FAMILIES = ["llama", "gemma3_text"]
IDS = torch.randint(6, 288, (2, 40), generator=torch.Generator().manual_seed(0))


def load(folder: Path, offload: bool, **changes: Any) -> tuple[Any, Any]:
    options = {"max_seq_length": 64, "dtype": torch.bfloat16, "load_in_4bit": False, **changes}
    return FastLanguageModel.from_pretrained(str(folder), offload_embedding=offload, **options)


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny(tmp_path / request.param, request.param, tie_word_embeddings=False)


@pytest.mark.parametrize("four", [False, True], ids=["dense", "NF4"])
def test_logits_gradients_and_generation_are_the_same(folder: Path, four: bool) -> None:
    results = []
    for offload in (False, True):
        model, _ = load(folder, offload, load_in_4bit=four)
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, HostEmbedding) is offload
        assert embedding.weight.is_cuda is not offload and (not offload or embedding.weight.is_pinned())
        assert model.device.type == "cuda" and next(model.parameters()).is_cuda
        model = FastLanguageModel.get_peft_model(model, r=4, use_gradient_checkpointing=True)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.ones_like(parameter) * 0.01)
        ids = IDS.cuda()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        written = model.for_inference().generate(input_ids=ids[:, :8], max_new_tokens=6, do_sample=False)
        results.append([loss.detach(), *gradients, written])
    assert len(results[0]) == len(results[1]) > 10
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_data_parallel_processes_leave_it_where_it_is(folder: Path, tmp_path: Path) -> None:
    found = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        for parallel in (False, True):
            model, _ = load(folder, True)
            model = FastLanguageModel.get_peft_model(model, r=4).train()
            run = DistributedDataParallel(model, device_ids=[0]) if parallel else model
            run(input_ids=IDS.cuda(), labels=IDS.cuda()).loss.backward()
            assert not model.get_input_embeddings().weight.is_cuda
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    finally:
        torch.distributed.destroy_process_group()
    assert len(found[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_trainer_moves_the_model_and_not_the_embedding(folder: Path, tmp_path: Path) -> None:
    losses = []
    for offload in (False, True):
        model, tokenizer = load(folder, offload)
        model = FastLanguageModel.get_peft_model(model, r=4)
        args = sft_config(
            model, output_dir=str(tmp_path / str(offload)), max_steps=3, save_steps=3, logging_steps=1, report_to="none",
            disable_tqdm=True, per_device_train_batch_size=2,
        )  # fmt: skip
        data = Dataset.from_list([{"text": "abc def " * (1 + i % 4)} for i in range(8)])
        trainer = SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
        assert not args.use_cpu and trainer.args.device.type == "cuda"
        trainer.train()
        embedding = model.get_input_embeddings()
        assert embedding.weight.is_cuda is not offload
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        model.save_pretrained_merged(tmp_path / f"merged-{offload}", tokenizer)
    assert losses[0] == losses[1] and len(losses[0]) == 3
    plain, kept = (load(tmp_path / f"merged-{offload}", False)[0].state_dict() for offload in (False, True))
    assert plain.keys() == kept.keys() and all(torch.equal(plain[name], kept[name]) for name in plain)


def test_moves_copies_and_dtypes(folder: Path) -> None:
    model, _ = load(folder, True)
    ids = IDS.cuda()
    with torch.no_grad():
        before = model(ids).logits
        model.cpu()
        assert model(IDS).logits.device.type == "cpu" and not model.get_input_embeddings().weight.is_cuda
        model.cuda()
        assert torch.equal(model(ids).logits, before)
        half = model.half()(ids).logits
        assert half.dtype == torch.float16 and bool(half.isfinite().all())


def test_the_memory_is_given_back(tmp_path: Path) -> None:
    sizes = []
    big = save_tiny(tmp_path / "big", tie_word_embeddings=False, vocab_size=50000)
    for offload in (False, True):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model, _ = load(big, offload)
        sizes.append(torch.cuda.memory_allocated() - before)
        del model
    assert sizes[0] - sizes[1] >= 50000 * 64 * 2 * 0.99


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_the_host_never_waits_and_order_is_kept() -> None:
    """Ids that are made on the device just before, and an output that is overwritten just after, on a side stream too."""
    table = torch.randn(1000, 4096).bfloat16().pin_memory()
    ids = torch.randint(0, 1000, (4096,), device="cuda")
    host_rows(table, ids)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # pyright: ignore[reportPrivateUsage]
            late = (ids + 1) % 1000
            rows = host_rows(table, late)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(rows.cpu(), table[((ids + 1) % 1000).cpu()])


def test_a_table_that_is_not_pinned_and_ids_outside_of_it() -> None:
    ids = torch.tensor([0, 5, -1], device="cuda")
    with pytest.raises(ValueError, match="pinned"):
        host_rows(torch.ones(5, 8), ids)
    rows = host_rows(torch.ones(5, 8).pin_memory(), ids)
    assert bool((rows[0] == 1).all()) and bool(rows[1:].isnan().all())


def test_speed_of_the_rows(record_property: Any) -> None:
    """8192 rows of 8 KiB are 64 MiB over the bus: within 4 x the copy of as many pinned bytes."""
    table = torch.randn(32000, 4096).bfloat16().pin_memory()
    ids = torch.randint(0, 32000, (8192,), device="cuda")
    staged = torch.empty(8192, 4096, dtype=torch.bfloat16).pin_memory()
    milliseconds = []
    for call in (lambda: host_rows(table, ids), lambda: staged.to("cuda", non_blocking=True)):
        call()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            call()
        end.record()
        torch.cuda.synchronize()
        milliseconds.append(begin.elapsed_time(end) / 10)
    record_property("rows_ms", milliseconds[0])
    record_property("copy_ms", milliseconds[1])
    assert milliseconds[0] < 4 * milliseconds[1], milliseconds


def test_a_trained_embedding_is_refused(folder: Path) -> None:
    model, _ = load(folder, True)
    with pytest.raises(OptionError, match="offload_embedding"):
        FastLanguageModel.get_peft_model(model, target_modules=["q_proj", "embed_tokens"])
