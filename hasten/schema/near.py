"""The name that was meant: one of ours that is similar, or the one that other libraries spell differently."""

from collections.abc import Iterable, Mapping

from hasten.suggest import did_you_mean

ELSEWHERE: Mapping[str, str] = {
    # the model
    "base_model": "model_name", "model_name_or_path": "model_name", "model_id": "model_name", "model_path": "model_name",
    "pretrained_model_name_or_path": "model_name", "sequence_len": "max_seq_length", "seq_len": "max_seq_length",
    "seq_length": "max_seq_length", "sequence_length": "max_seq_length", "cutoff_len": "max_seq_length",
    "max_seq_len": "max_seq_length", "max_length": "max_seq_length", "context_length": "max_seq_length",
    "model_max_length": "max_seq_length", "torch_dtype": "dtype", "precision": "dtype", "bnb_4bit": "load_in_4bit",
    "quantization": "load_in_4bit", "quantization_bit": "load_in_4bit", "qlora": "load_in_4bit",
    "flash_attention": "attn_implementation", "flash_attn": "attn_implementation", "gradient_checkpointing":
    "use_gradient_checkpointing", "activation_checkpointing": "use_gradient_checkpointing",
    # the adapter
    "rank": "r", "lora_rank": "r", "lora_r": "r", "lora_dim": "r", "alpha": "lora_alpha", "dropout": "lora_dropout",
    "lora_target": "target_modules", "lora_target_modules": "target_modules", "lora_target_linear": "target_modules",
    "lora_modules_to_save": "modules_to_save", "additional_target": "modules_to_save",
    "lora_layers_to_transform": "layers_to_transform", "peft_use_dora": "use_dora", "peft_use_rslora": "use_rslora",
    "lora_bias": "bias",
    # the data
    "dataset": "path", "datasets": "path", "dataset_path": "path", "dataset_name": "path", "train_file": "path",
    "data_path": "path", "data_files": "path", "validation_file": "eval_path", "test_datasets": "eval_path",
    "eval_dataset": "eval_path", "val_size": "eval_split", "val_set_size": "eval_split", "dataset_config": "name",
    "text_column": "text_field", "dataset_text_field": "text_field", "field": "text_field", "truncation": "too_long",
    "excess_length_strategy": "too_long",
    # training
    "lr": "learning_rate", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "n_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size", "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps", "grad_accum_steps": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps", "accumulate_grad_batches": "gradient_accumulation_steps",
    "steps": "max_steps", "num_steps": "max_steps", "train_steps": "max_steps", "iters": "max_steps",
    "lr_scheduler": "lr_scheduler_type", "scheduler": "lr_scheduler_type", "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps", "num_warmup_steps": "warmup_steps", "optimizer": "optim", "sample_packing": "packing",
    "eval_sample_packing": "eval_packing", "grad_clip": "max_grad_norm", "gradient_clipping": "max_grad_norm",
    "evaluation_strategy": "eval_strategy", "log_every": "logging_steps", "save_every": "save_steps",
    "train_on_inputs": "completion_only_loss", "train_on_prompt": "completion_only_loss", "random_seed": "seed",
    "output": "output_dir", "save_dir": "output_dir", "out_dir": "output_dir",
    # saving
    "save_method": "method", "output_model": "folder",
}  # fmt: skip
"""Names of axolotl, LLaMA-Factory, TRL, PEFT and torch -> hasten's, by the kind of thing that they set."""


def suggestion(name: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str:
    """ " (did you mean r?)": another library's spelling of one of `known`, else the similar ones; "" where there is none.

    elsewhere: {name: section} of names that belong to other sections of a job file.
    """
    known = list(known)
    meant = ELSEWHERE.get(name)
    if elsewhere and name in elsewhere:
        return f" (it belongs to the section {elsewhere[name]!r})"
    if meant in known:
        return f" (did you mean {meant}?)"
    if meant is not None and elsewhere and meant in elsewhere:
        return f" (did you mean {elsewhere[meant]}.{meant}?)"
    return did_you_mean(name, known)
