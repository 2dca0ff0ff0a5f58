"""One of two data-parallel processes: `python ddp_job.py RANK FOLDER [cuda]`, on CPUs or each on a GPU of its own. Rank 0 leaves every case's gradients in FOLDER."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from training_kit import gradients_of, lora, small

from hasten.training import checkpointing
from hasten.training.memory.offload import OffloadSizes, offload_sizes

RANKS = 2
MODES: dict[str, tuple[bool | str, int | None]] = {
    "kept": (False, None),
    "recomputed": (True, None),
    "offloaded": ("offload", None),
    "planned, no room": ("auto", 1),
    "planned, room": ("auto", None),
}
MICROBATCHES = 2
"""Gradients meet in the last one alone; both have another length on each rank."""


def rows_of(rank: int, micro: int) -> torch.Tensor:
    length = 12 + 6 * micro + 2 * rank
    return torch.randint(6, 90, (2, length), generator=torch.Generator().manual_seed(10 * micro + rank))


def all_rows() -> list[torch.Tensor]:
    return [rows_of(rank, micro) for micro in range(MICROBATCHES) for rank in range(RANKS)]


def labels() -> int:
    """Predicted tokens of all ranks' microbatches."""
    return sum(ids[:, 1:].numel() for ids in all_rows())


def model_in(mode: str) -> Any:
    model = small("llama", True, lora())
    checkpointing.enable(model, *MODES[mode])
    return model


def accumulated(mode: str, rank: int, device: torch.device) -> dict[str, torch.Tensor]:
    model = model_in(mode).to(device)
    parallel = DistributedDataParallel(model)
    for micro in range(MICROBATCHES):
        ids = rows_of(rank, micro).to(device)
        waits = contextlib.nullcontext() if micro == MICROBATCHES - 1 else parallel.no_sync()
        with waits:
            loss = parallel(input_ids=ids, labels=ids, num_items_in_batch=labels()).loss
            (RANKS * loss).backward()  # the ranks' gradients are averaged
    return gradients_of(model)


def main(rank: int, folder: Path, kind: str = "cpu") -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=RANKS)
    with offload_sizes(OffloadSizes(chunk=4096, smallest=1)):  # tiny tensors too
        found = {mode: accumulated(mode, rank, device) for mode in MODES}
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
