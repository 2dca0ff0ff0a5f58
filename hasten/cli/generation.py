"""`hasten generate` and `hasten serve`."""

from typing import Annotated, Any

import typer

from hasten.cli.adapters import Adapters, check_adapters
from hasten.cli.arguments import Load, ModelName, finite
from hasten.cli.console import load_model, quiet, say
from hasten.errors import OptionError

AdapterNames = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="[NAME=]FOLDER",
        help="An adapter for the model, checked before the model is loaded. May be repeated; the first one is active.",
    ),
]
MaxSeqLength = Annotated[int, typer.Option(min=1, help="Longest sequence in tokens, prompt and answer together.")]


def generate(  # noqa: PLR0913
    model: ModelName,
    load: Load,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT...]", help="One or more prompts; none starts a chat.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt, before every conversation.")] = None,
    adapter: AdapterNames = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, callback=finite, help="0 = greedy decoding.")] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this probability together.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Sample from the K likeliest tokens; 0 = all.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling repeatable.")] = None,
    raw: Annotated[bool, typer.Option(help="Continue the text as it is, without the chat template.")] = False,
    max_seq_length: MaxSeqLength = 2048,
) -> None:
    """Generate answers to prompts and print them token by token. Without a prompt: chat; /help lists its commands."""
    sampling = _sampling(temperature, top_p=top_p, top_k=top_k, seed=seed)
    if raw and system is not None:
        raise OptionError("hasten generate", ["--system needs the chat template, which --raw leaves out"])
    quiet()
    checked = check_adapters(adapter or [], model)
    import torch

    from hasten.cli.answer import Settings, answer, encode
    from hasten.cli.chat import Chat, read_lines
    from hasten.inference import for_inference

    network, tokenizer = load_model(model, load, max_seq_length)
    for_inference(network)
    adapters = Adapters(network, tokenizer, checked)
    if seed is not None:
        torch.manual_seed(seed)
    settings = Settings(max_seq_length, max_new_tokens, sampling, raw)
    if not prompts:
        Chat(adapters, settings, system).run(read_lines())
        return
    opening = [] if system is None else [{"role": "system", "content": system}]
    for prompt in prompts:
        plain = raw or (not opening and not adapters.tokenizer.chat_template)
        ids = encode(adapters.tokenizer, [*opening, {"role": "user", "content": prompt}], plain)
        answer(adapters.model, adapters.tokenizer, ids, max_new_tokens, sampling)


def _sampling(temperature: float, **others: Any) -> dict[str, Any]:
    """Returns the arguments of `generate`. Raises OptionError for parameters of sampling where nothing is sampled."""
    given = {name: value for name, value in others.items() if value is not None}
    if temperature > 0:
        given.pop("seed", None)
        return {"do_sample": True, "temperature": temperature, **given}
    if given:
        needs = [
            f"--{name.replace('_', '-')} has no effect on greedy decoding; pass a --temperature above 0"
            for name in given
        ]
        raise OptionError("hasten generate", needs)
    return {"do_sample": False}


def serve(  # noqa: PLR0913
    model: ModelName,
    load: Load,
    host: Annotated[
        str, typer.Option(help="Address to listen at; other machines reach only other ones.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="HASTEN_API_KEY", help="What clients must send; without it, any client is served."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the protocol; default: as given.")] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="An adapter for the model, checked before the model is loaded.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=256, help="Sequences that are decoded together.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=1, help="Sequences that wait; further calls get status 429.")] = 64,
    max_seq_length: MaxSeqLength = 2048,
) -> None:
    """Serve a model over the OpenAI protocol: completions and chat, with continuous batching."""
    from hasten.serving.server import bind, hosts_of, require_extra

    require_extra()
    if api_key is not None and not api_key.strip():
        raise OptionError("hasten serve", ["--api-key is empty; leave it out to serve any client"])
    quiet()
    checked = check_adapters([adapter] if adapter else [], model)
    with bind(host, port, api_key is not None) as taken:
        from hasten.inference import for_inference
        from hasten.serving.server import serve as run
        from hasten.serving.service import open_service

        network, tokenizer = load_model(model, load, max_seq_length)
        for_inference(network)
        used = Adapters(network, tokenizer, checked)
        service = open_service(used.model, used.tokenizer, name or model, max_batch, max_waiting)
        at = f"[{host}]" if ":" in host else host
        say(f"{service.name}: http://{at}:{taken.getsockname()[1]}/v1\n{service.note}")
        run(service, taken, api_key, hosts_of(host))
