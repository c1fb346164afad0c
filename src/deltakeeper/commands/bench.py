"""`deltakeeper bench`: measurements on this machine."""

from __future__ import annotations

import statistics
from typing import Annotated

import typer

from deltakeeper.commands.output import bar, console, in_bytes, print_json

bench = typer.Typer(name="bench", help="Measure on this machine.", no_args_is_help=True, rich_markup_mode=None)


@bench.callback()
def _root() -> None: ...


@bench.command("serve-offline")
def serve_offline(
    base: Annotated[str, typer.Option(help="Base model: a folder or a hub name.")],
    delta: Annotated[list[str], typer.Option(help="An artifact, as PATH or NAME=PATH (may be given several times).")],
    tenants: Annotated[
        int | None, typer.Option(help="How many tenants; one an artifact by default, more take them in turn.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    requests: Annotated[int, typer.Option(help="Requests at once.")] = 32,
    rounds: Annotated[int, typer.Option(help="How often base and tenants take turns.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure tokens a second of a base alone and of its tenants mixed, in turns, and what a tenant costs in memory.

    Prompts are random tokens. Threads are torch's; OMP_NUM_THREADS sets their number.

    Example: deltakeeper bench serve-offline --base ./base --delta ./delta --tenants 32
    """
    from deltakeeper.live_base import named_sources, open_base
    from deltakeeper.serving_bench import Workload, measure_serving

    workload = Workload(requests, prompt_tokens, new_tokens, rounds)
    sources = named_sources(text if "=" in text else f"delta{i}={text}" for i, text in enumerate(delta, 1))
    live = open_base(base, tokenizer=False)
    with bar("Serve", quiet=as_json) as progress:
        found = measure_serving(live, live.artifacts(sources), workload, tenants=tenants, progress=progress)
    if as_json:
        print_json(found.to_json())
        return
    screen = console()
    screen.print(
        f"{requests} requests of {prompt_tokens} + {new_tokens} tokens, rounds: {rounds}, kernels: {found.kernels}, "
        f"threads: {found.threads}."
    )
    for title, rates in (
        ("base alone", found.base_tokens_s),
        (f"tenants mixed ({found.tenants})", found.mixed_tokens_s),
    ):
        screen.print(f"{title}: {statistics.median(rates):.1f} tokens/s (median; {min(rates):.1f} to {max(rates):.1f})")
    screen.print(f"The tenants are served at {100 * found.share:.0f} % of the base's speed.")
    size = round(statistics.mean(found.tenant_bytes))
    grown = "" if found.resident_bytes is None else f"; the process grew by {in_bytes(found.resident_bytes)} each"
    screen.print(
        f"A tenant holds {in_bytes(size)}, {100 * size / found.base_bytes:.1f} % of the base's weights{grown}. "
        f"Loading took {found.load_seconds:.2f} s each."
    )
