"""One training step of one variant on one shape: loss per step, median time, peak memory. Prints one JSON line.

Run as a process of its own, because some peers patch the whole process:
    python -m benchmarks.train_step VARIANT SHAPE JOB BATCH LENGTH CHECKPOINT_FOLDER [--recompute]
VARIANT: transformers, liger, unsloth, hasten. JOB: lora, qlora, full.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import checkpoint

WARM, TIMED = 3, 8
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(variant: str, job: str, folder: Path, length: int, recompute: bool) -> Any:
    if variant == "unsloth":
        from unsloth import FastLanguageModel

        mode: Any = "unsloth" if recompute else False
    elif variant == "hasten":
        from hasten import FastLanguageModel

        mode = recompute
    else:
        return build_transformers(variant, job, folder, recompute)
    flags = {"load_in_4bit": job == "qlora", "load_in_16bit": job != "qlora", "full_finetuning": job == "full"}
    extra = {"use_gradient_checkpointing": mode} if job == "full" else {}
    if variant == "hasten":
        extra["fix_tokenizer"] = False
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=length, dtype=torch.bfloat16, **flags, **extra
    )
    if job == "full":
        return model
    return FastLanguageModel.get_peft_model(
        model, r=16, target_modules=LINEARS, lora_alpha=16, use_gradient_checkpointing=mode, random_state=3407
    )


def build_transformers(variant: str, job: str, folder: Path, recompute: bool) -> Any:
    if variant == "liger":
        from liger_kernel.transformers import AutoLigerKernelForCausalLM as Auto
    else:
        from transformers import AutoModelForCausalLM as Auto
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    quantization = {}
    if job == "qlora":
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    model: Any = Auto.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda", **quantization)
    if job != "full":
        torch.manual_seed(3407)
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM"))
    if recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def same_start(model: Any) -> None:
    """The same LoRA A for every variant, whatever drew it first."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, device="cuda").to(parameter.dtype) * 0.01


def run(model: Any, batch: int, length: int, words: int, profile: Path | None = None) -> dict[str, Any]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(2)
    losses, times = [], []
    start = time.perf_counter()

    def step() -> torch.Tensor:
        ids = torch.randint(10, words, (batch, length), generator=generator).to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    first = 0.0
    for index in range(WARM + TIMED):
        torch.cuda.synchronize()
        if index == WARM:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        if index == 0:
            first = time.perf_counter() - start
        if index >= WARM:
            times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 2**30
    if profile is not None:
        _profile(step, profile)
    return {
        "losses": [float(x) for x in losses], "ms": statistics.median(times) * 1e3, "min_ms": min(times) * 1e3,
        "peak_gib": peak, "first_step_s": first, "dtype": str(trained[0].dtype),
    }  # fmt: skip


def _profile(step: Any, target: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        step()
        torch.cuda.synchronize()
    target.write_text(
        recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (
        ("variant", str),
        ("shape", str),
        ("job", str),
        ("batch", int),
        ("length", int),
        ("folder", Path),
    ):
        parser.add_argument(name, type=kind)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--profile", type=Path)
    args = parser.parse_args()
    if args.variant == "unsloth":
        import unsloth  # noqa: F401  (it wants to be imported before transformers)
    from benchmarks.shapes import SHAPES

    folder = checkpoint(args.shape, args.folder)
    model = build(args.variant, args.job, folder, args.length, args.recompute)
    same_start(model)
    result = run(model, args.batch, args.length, SHAPES[args.shape]["vocab_size"], args.profile)
    known = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    print("RESULT " + json.dumps({**known, **result}))


if __name__ == "__main__":
    main()
