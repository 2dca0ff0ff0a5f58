"""What tests of the guarantees run in fresh processes: whole, killed and resumed training runs, and ranks of a parallel one."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from cli_kit import write_job
from guarantee_kit import IDS, adapted
from torch import distributed

from hasten import FastLanguageModel
from hasten.training.config import read_job
from hasten.training.job import run

STEPS, SAVED, KILLED = 8, 4, 6
RANKS = 2


def job_file(folder: Path, **train: Any) -> Path:
    """A job of `STEPS` steps in an epoch and a bit, with dropout, accumulation, warmup and trained embeddings."""
    return write_job(
        folder,
        adapter={"lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
        train={
            "max_steps": STEPS,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 1,
            "save_strategy": "steps",
            "save_steps": SAVED,
            "warmup_steps": 3,
            "lr_scheduler_type": "cosine",
            **train,
        },
    )


def train(path: Path, resume: bool = False, kill_at: int | None = None) -> None:
    """Runs a job; at optimizer step `kill_at` the process is killed without warning."""
    forwards = []

    def adapt(model: Any, **options: Any) -> Any:
        def count(module: Any, args: Any) -> None:
            forwards.append(1)
            if kill_at is not None and len(forwards) == 2 * kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        peft = FastLanguageModel.get_peft_model(model, **options)
        peft.register_forward_pre_hook(count)
        return peft

    run(read_job(path), FastLanguageModel.from_pretrained, adapt, resume=resume)


def rank_of_ddp(rank: int, base: Path, folder: Path) -> None:
    """Averages a rank's gradients over gloo, on the CPU; rank 0 saves them."""
    _meet(rank, folder)
    model, _ = adapted(base, {"init_lora_weights": False}, device_map="cpu")
    parallel = torch.nn.parallel.DistributedDataParallel(model.train())
    ids = IDS[rank : rank + 1].cpu()
    parallel(input_ids=ids, labels=ids).loss.backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, folder / "grads.pt")
        torch.save(distributed.get_world_size(), folder / "world.pt")
    distributed.barrier()
    del parallel  # before the process group: the destructor of its reducer can wait for ever afterwards
    distributed.destroy_process_group()


def rank_of_fsdp(rank: int, base: Path, folder: Path) -> None:
    """One sharded step of SGD on the CPU, whose adapter rank 0 saves by the names it has without sharding."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    mesh = _meet(rank, folder)
    model, _ = adapted(base, {"init_lora_weights": False}, device_map="cpu")
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    one_step(model.train(), IDS[rank : rank + 1].cpu())
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save({name: t for name, t in whole.items() if "lora_" in name}, folder / "adapter.pt")
    distributed.destroy_process_group()


def one_step(model: Any, ids: torch.Tensor) -> None:
    """One step of SGD without momentum."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def _meet(rank: int, folder: Path) -> Any:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    return distributed.init_device_mesh("cpu", (RANKS,))
