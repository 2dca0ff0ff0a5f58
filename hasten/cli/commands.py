"""The `hasten` command. Every command is a few lines on top of the library, and only this package prints."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from hasten import __version__
from hasten.cli.arguments import Checkpointing, Load, Method, ModelName, Optimizer, byte_count
from hasten.cli.console import load_model, quiet, say, show_error
from hasten.cli.generation import generate, serve
from hasten.cli.resume import RESUME_CHOICES, TrainCommand, resume_choice
from hasten.errors import ExportError, HastenError
from hasten.units import format_bytes

FAILED = 2
"""Exit code of every error that hasten raises on purpose. `doctor` exits with 1 if it finds a problem."""
COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


class Commands(TyperGroup):
    """A command group that reports user errors as a message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; with `--debug` its errors are raised."""
        try:
            return super().invoke(ctx)
        except HastenError as error:
            if ctx.params.get("debug"):
                raise
            show_error(error)
            raise typer.Exit(FAILED) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


def show_version(asked: bool) -> None:
    """Prints the version and ends the command."""
    if asked:
        typer.echo(f"hasten {__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fast, lean and exact fine-tuning of Hugging Face causal language models."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of all outputs.")] = Path("runs/demo"),
    quick: Annotated[
        bool, typer.Option(help="Use a much smaller model: takes half a minute and answers poorly.")
    ] = False,
) -> None:
    """Pretrain a small language model, fine-tune it with QLoRA, evaluate it, merge it and check the merge. Needs no
    download."""
    quiet()
    from hasten.demo.pipeline import FULL, QUICK, run_demo
    from hasten.export.target import check_writable

    check_writable(out / "merged")  # fails before minutes of training
    run_demo(out, Console(), QUICK if quick else FULL)


@app.command(cls=TrainCommand)
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file with the sections model, adapter, data, train and save.")],
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[force]",
            help="Resume from the newest complete checkpoint of the run; force: even if settings differ.",
            callback=resume_choice,
        ),
    ] = None,
) -> None:
    """Fine-tune a model as configured in a YAML file."""
    from hasten.schema.job_file import read_sections

    read_sections(config)  # before the imports that take seconds
    quiet()
    from hasten.export.target import check_writable
    from hasten.model import FastLanguageModel
    from hasten.training.config import read_job
    from hasten.training.job import run as run_job

    console = Console()
    job = read_job(config)
    check_writable(job.saved)  # fails before hours of training, not after
    how = RESUME_CHOICES.get(resume, False)
    done = run_job(job, FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model, console, how)
    if done.already:
        say(f"the run had finished at step {done.steps}; nothing to do. model: {done.saved}")
        return
    say(f"{done.steps} steps, mean loss {done.loss:.4f}; {done.counts}")
    if done.dropped:
        console.print(f"[yellow]{done.dropped} examples were dropped for being too long[/]")
    say(f"model: {done.saved}\nmetrics and curve: {done.folder}")


app.command()(generate)
app.command()(serve)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="A folder or hub id of an adapter.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    method: Method = "merged_16bit",
) -> None:
    """Merge an adapter into its base model and write a standard checkpoint."""
    quiet()
    from hasten.export.target import check_writable
    from hasten.loading.resolve import ADAPTER_CONFIG
    from hasten.model import FastLanguageModel

    if Path(adapter).is_dir():
        _require_adapter(adapter, (Path(adapter) / ADAPTER_CONFIG).is_file())  # before a base model is loaded
    check_writable(out)  # before the model is loaded
    network, tokenizer = FastLanguageModel.from_pretrained(adapter, load_in_16bit=True, device_map="cpu")
    _require_adapter(adapter, hasattr(network, "get_base_model"))
    done: Any = network.save_pretrained_merged(out, tokenizer, save_method=method)
    divergence = "" if done.kl is None else f", KL divergence from 16 bits {done.kl:.4g} nats per token"
    say(f"{done.folder}: {done.method}, {format_bytes(done.bytes)}{divergence}")


@app.command()
def report(
    model: ModelName,
    load: Load,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where a module does not run fused.")] = False,
) -> None:
    """Load a model and show what runs in each of its modules, and why."""
    quiet()
    from hasten.patching import report as report_of

    network, _ = load_model(model, load, 2048)
    typer.echo(str(report_of(network)))
    if strict:
        report_of(network, strict=True)


@app.command()
def estimate(  # noqa: PLR0913
    model: Annotated[str, typer.Argument(help="A folder or hub id; only its config is read.")],
    load: Load,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 1,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA on all Linear layers.")] = 16,
    checkpointing: Annotated[
        Checkpointing, typer.Option(help="Activation checkpointing: what layers recompute or offload.")
    ] = Checkpointing.on,
    full_finetuning: Annotated[bool, typer.Option(help="All weights train.")] = False,
    tiled_mlp: Annotated[bool, typer.Option(help="Run MLPs in tiles of tokens.")] = False,
    optimizer: Annotated[Optimizer, typer.Option(help="How the optimizer stores Adam's moments.")] = Optimizer.adamw,
    offload_embedding: Annotated[bool, typer.Option(help="Offload the input embedding to CPU memory.")] = False,
    memory_budget: Annotated[
        str | None, typer.Option(callback=byte_count, help='For auto, e.g. "24GiB"; default: the memory of the GPU.')
    ] = None,
) -> None:
    """Estimate the peak memory of a training step, and plan recomputation and offloading, from the config alone."""
    quiet()
    from hasten.estimation import estimate as estimate_of
    from hasten.training.memory.advice import advice

    found = estimate_of(
        model,
        batch_size=batch_size,
        seq_len=seq_len,
        rank=rank,
        quantization=None if full_finetuning else load,
        checkpointing={"true": True, "false": False}.get(checkpointing.value, checkpointing.value),
        full_finetuning=full_finetuning,
        tiled_mlp=tiled_mlp,
        optimizer=optimizer.value,
        offload_embedding=offload_embedding,
        memory_budget=memory_budget,
    )
    table = Table("part", "memory", title=Text(f"{model}: one step of {batch_size} x {seq_len} tokens"))
    for part, size in found.parts().items():
        table.add_row(part, format_bytes(size))
    table.add_section()
    table.add_row("[bold]total", f"[bold]{format_bytes(found.total)}")
    if found.peak.host:
        table.add_row("in CPU memory", format_bytes(found.peak.host))
    console = Console()
    console.print(table)
    say(f"plan: {found.plan}")
    if not found.fits:
        say(f"more than {memory_budget or 'the GPU has'}: no plan needs less", "yellow")
    say(advice(found.savings))


@app.command()
def doctor() -> None:
    """Check versions, GPU, disk and optional packages. Exits with 1 if there is a problem, and says how to fix it."""
    from hasten.doctor import examine, look, problems

    findings = examine(look())
    table = Table("", "", "found", "what to do")
    for finding in findings:
        level = Text(finding.level, COLOURS[finding.level])
        table.add_row(level, Text(finding.subject), Text(finding.found), Text(finding.fix))
    Console().print(table)
    if count := len(problems(findings)):
        Console(stderr=True).print(f"[bold red]{count} problem{'s' if count > 1 else ''}[/]")
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(ctx: typer.Context, script: Annotated[Path, typer.Argument(help="A Python script.")]) -> None:
    """Run a script written for unsloth, with its arguments, on hasten."""
    from hasten.unsloth_compat import run as run_script

    run_script(script, ctx.args)


def _require_adapter(name: str, found: bool) -> None:
    """Raises ExportError where there is nothing to merge, since the result would be the base model unchanged."""
    if not found:
        raise ExportError(f"{name} has no adapter (adapter_config.json), so there is nothing to merge; pass an adapter")
