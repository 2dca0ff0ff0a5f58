"""What a training run's continuation depends on, as plain values: stored with each checkpoint, compared before one is used."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hasten.state import causal_lm_of, find_state

SAMPLES = 16
"""Values of each frozen weight that are hashed, evenly spaced: enough to tell models apart, and no pass over the weights."""
ROWS = 1000
"""Examples that are hashed at a time."""
NO_LENGTH = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules whose learning rates do not depend on the number of steps, so that a run may be made longer."""
WITHOUT_EFFECT = (
    "auto_find_batch_size", "batch_eval_metrics", "dataloader_multiprocessing_context", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_num_proc", "ddp_timeout",
    "debug", "disable_tqdm", "do_", "enable_jit_checkpoint", "eval_", "full_determinism", "greater_is_better", "hub_", "ignore_data_skip",
    "include_", "load_best_model_at_end", "local_rank", "log_", "logging_", "max_steps", "metric_for_best_model",
    "num_train_epochs", "output_dir", "per_device_eval_batch_size", "prediction_loss_only", "project", "push_to_hub",
    "report_to", "restore_callback_states_from_checkpoint", "resume_from_checkpoint", "run_name", "save_",
    "skip_memory_metrics", "torch_empty_cache_steps", "trackio_", "use_cpu",
)  # fmt: skip
"""Settings of the trainer, or how their names begin, that change no weight, and the run's length, which `_schedule` records."""
PEFT_PATHS = ("base_model_name_or_path", "inference_mode", "peft_version", "auto_mapping", "revision")
FIXED = ("trained weights", "train.optim", "adapter.peft_type")
"""Differences that cannot be forced: the optimizer's state is of other weights or of another optimizer."""


def fingerprint(trainer: Any) -> dict[str, Any]:
    """{section.name: value} of everything that decides how the run of `trainer` goes on from a checkpoint.

    The model (name, revision, commit, samples of its frozen weights), the adapter's config, names, shapes and dtypes of the
    trained weights, every token and label of the training data in their order, the trainer's settings (seed, batch, optimizer,
    precision), the learning-rate schedule, and the number of processes. Values are JSON's. Reads all data, and few weights.
    """
    model = trainer.model
    flat: dict[str, Any] = {}
    flat |= _section("model", _model(model))
    flat |= _section("adapter", _adapter(model))
    flat |= _section("data", _data(trainer.train_dataset))
    flat |= _section("train", _settings(trainer))
    flat |= _section("schedule", _schedule(trainer.args))
    flat["trained weights"] = _trained(model)
    flat["processes"] = trainer.args.world_size
    return flat


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """{name: sentence} of what differs. A setting that only one of both has, as between versions of a library, does not count
    unless it is of the adapter."""
    found = {}
    for name in sorted(then.keys() | now.keys()):
        both = name in then and name in now
        if (both or name.startswith("adapter.")) and then.get(name) != now.get(name):
            found[name] = f"{name}: {_shown(then.get(name))} in the checkpoint, {_shown(now.get(name))} now"
    return found


def _model(model: Any) -> dict[str, Any]:
    base = causal_lm_of(model)
    state = find_state(base)
    options = None if state is None else state.load_options
    name = str(base.config._name_or_path if options is None else options.model_name)
    return {
        "name": name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1],  # a folder may move
        "type": base.config.model_type,
        "revision": None if options is None else options.revision,
        "commit": getattr(base.config, "_commit_hash", None),
        "dtype": str(base.dtype),
        "weight format": None if options is None else options.weight_format,
        "frozen weights": _frozen(model),
    }


def _frozen(model: Any) -> str:
    digest = hashlib.sha256()
    samples: dict[torch.device, list[torch.Tensor]] = {}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad or parameter.is_meta or not parameter.numel():
            continue
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        samples.setdefault(flat.device, []).append(flat[places.to(flat.device)].contiguous().view(torch.uint8))
    for device in sorted(samples, key=str):
        digest.update(torch.cat(samples[device]).cpu().numpy().tobytes())
    return digest.hexdigest()


def _trained(model: Any) -> str:
    lines = [f"{n} {tuple(p.shape)} {p.dtype}" for n, p in model.named_parameters() if p.requires_grad]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return f"{len(lines)} tensors, {digest[:16]}"


def _adapter(model: Any) -> dict[str, Any]:
    configs = getattr(model, "peft_config", {})
    if not configs:
        return {"": "none"}
    config = configs[model.active_adapters[0] if hasattr(model, "active_adapters") else next(iter(configs))]
    return {name: _plain(value) for name, value in config.to_dict().items() if name not in PEFT_PATHS}


def _data(dataset: Any) -> dict[str, Any]:
    if dataset is None or not hasattr(dataset, "with_format") or not hasattr(dataset, "__len__"):
        return {"examples": "not counted"}
    digest = hashlib.sha256()
    for table in dataset.with_format("arrow").iter(ROWS):
        for column in sorted(table.column_names):
            digest.update(column.encode())
            for part in _buffers(table.column(column).combine_chunks()):
                digest.update(part)
    return {"examples": len(dataset), "content": digest.hexdigest()}


def _buffers(array: Any) -> Iterator[bytes]:
    """The values of an Arrow array as bytes, the same for equal values however they are stored."""
    import pyarrow

    if isinstance(array, pyarrow.ChunkedArray):
        array = pyarrow.concat_arrays(array.chunks)
    if pyarrow.types.is_list(array.type) or pyarrow.types.is_large_list(array.type):
        yield str(array.value_lengths().to_pylist()).encode()
        yield from _buffers(array.flatten())
    elif pyarrow.types.is_integer(array.type) or pyarrow.types.is_floating(array.type):
        yield str(array.null_count).encode()
        yield (
            array.cast(pyarrow.float64() if pyarrow.types.is_floating(array.type) else pyarrow.int64())
            .to_numpy(zero_copy_only=False)
            .tobytes()
        )
    else:
        yield repr(array.to_pylist()).encode()


def _settings(trainer: Any) -> dict[str, Any]:
    settings = {
        name: _plain(value) for name, value in trainer.args.to_dict().items() if not name.startswith(WITHOUT_EFFECT)
    }
    asked = getattr(trainer, "optimizer_cls_and_kwargs", None)
    if asked is not None:
        settings["optim"] = asked[0].__name__
    schedule = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
    return {name: value for name, value in settings.items() if name not in schedule}


def _schedule(args: Any) -> dict[str, Any]:
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    warmup = args.warmup_steps or 0
    made = {"type": kind, "arguments": _plain(args.lr_scheduler_kwargs), "warmup steps": warmup}
    if kind not in NO_LENGTH or 0 < warmup < 1:
        made["length"] = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    return made


def _plain(value: Any) -> Any:
    """`value` as JSON has it, sets sorted, so that it is the same after writing and reading."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(inner) for inner in value)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | int | float | str):
        return getattr(value, "value", value)
    return str(getattr(value, "value", type(value).__name__))


def _section(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}" if name else section: value for name, value in values.items()}


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
