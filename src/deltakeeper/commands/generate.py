"""`deltakeeper generate`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from deltakeeper.commands.output import console, print_json


def generate(
    base: Annotated[str, typer.Option(help="Base model: a folder or a hub name.")],
    delta: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH: an artifact, and the name of its tenant (may be given several times)."),
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Who answers; the base by default. Lines of a file may name others.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What is asked.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A .jsonl file: each line with `prompt` or `messages`, and `tenant`; all in one batch."),
    ] = None,
    planes: Annotated[
        int | None, typer.Option(help="Sign planes to serve, from the coarsest on; all by default.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes answers at a temperature reproducible.")] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print a single answer as it comes.")] = True,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Whether to use the chat template; where there is one, by default."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON.")] = False,
) -> None:
    """Let a base and its tenants answer prompts, in one batch and from one copy of the base.

    Exit status 1 means that a prompt was not answered.

    Example: deltakeeper generate --base ./base --delta support=./delta --tenant support --prompt "Where is my order?"
    """
    from deltakeeper.engine import Sampling
    from deltakeeper.errors import DataError
    from deltakeeper.generation import answer_prompts, check_tenants
    from deltakeeper.live_base import named_sources, open_base
    from deltakeeper.prompting import Prompt, read_prompts

    if (prompt is None) == (prompts is None):
        raise DataError("give either --prompt or --prompts.")
    asked = [Prompt(prompt, tenant)] if prompts is None else read_prompts(prompts, tenant)  # type: ignore[arg-type]
    sources = named_sources(delta or [])
    check_tenants(asked, sources)
    sampling = Sampling(temperature=temperature, seed=seed)
    live = open_base(base)
    streaming = stream and not as_json and len(asked) == 1
    answers = answer_prompts(
        live,
        live.artifacts(sources),
        asked,
        planes=planes,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        chat=chat,
        on_text=_write if streaming else None,
    )
    if as_json:
        print_json({"answers": [asdict(answer) for answer in answers]})
    elif len(answers) == 1:
        _write("\n" if streaming else f"{answers[0].text}\n")
    else:
        screen = console()
        for number, answer in enumerate(answers, 1):
            screen.rule(f"{number}: {answer.tenant or 'base'}", align="left", style="default")
            _write(f"{answer.text}\n")
    for number, answer in enumerate(answers, 1):
        if answer.error is not None:
            typer.echo(f"deltakeeper: prompt {number} was not answered: {answer.error}", err=True)
    if any(answer.error is not None for answer in answers):
        raise typer.Exit(1)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
