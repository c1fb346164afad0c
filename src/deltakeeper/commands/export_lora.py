"""`deltakeeper export-lora`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltakeeper.commands.output import bar, console, print_json


def export_lora(
    delta: Annotated[str, typer.Argument(help="Artifact: a folder, or a hub name org/name[@revision].")],
    base: Annotated[str, typer.Option(help="Base model: a folder or a hub name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Adapter folder to write.")],
    rank: Annotated[
        int | None, typer.Option(help="Largest rank of a module; needed unless every delta is low-rank already.")
    ] = None,
    uniform_rank: Annotated[
        bool, typer.Option("--uniform-rank", help="Pad all modules to one rank, for servers without rank patterns.")
    ] = False,
    drop_rest: Annotated[
        bool, typer.Option("--drop-rest", help="Leave out what LoRA cannot hold: embeddings, head, norms, biases.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of the factors: float32, bfloat16 or float16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write an artifact as a PEFT LoRA adapter that PEFT and vLLM load.

    vLLM takes adapters up to its --max-lora-rank; the least that does is printed. It has no adapters for GPT-2.

    Example: deltakeeper export-lora ./delta --base ./base -o ./adapter --rank 64 --drop-rest
    """
    from deltakeeper.export import export_lora as run
    from deltakeeper.hub import resolve_artifact

    source = resolve_artifact(delta)
    with bar("Export", quiet=as_json) as progress:
        report = run(
            source,
            base,
            out,
            rank=rank,
            uniform_rank=uniform_rank,
            drop_rest=drop_rest,
            dtype=dtype,
            progress=progress,
        )
    if as_json:
        print_json(report.to_json())
        return
    screen = console()
    exact = sum(module.exact for module in report.modules.values())
    screen.print(
        f"Wrote {report.path}: {len(report.modules)} modules, {exact} of them with the artifact's own factors, rank "
        f"{report.rank}; relative error {report.relative_error:.4f} against what the artifact decodes to.",
        soft_wrap=True,
    )
    worst = sorted(report.modules.items(), key=lambda item: -item[1].relative_error)[:5]
    if report.relative_error > 1e-3:
        for name, module in worst:
            screen.print(f"  {name}: rank {module.rank}, relative error {module.relative_error:.4f}", soft_wrap=True)
    if report.vllm_rank:
        screen.print(f"Serve it with vLLM's --enable-lora --max-lora-rank {report.vllm_rank}.")
    else:
        screen.print("vLLM takes ranks up to 512 only; give a smaller --rank to serve it there.")
    for name, reason in report.dropped.items():
        screen.print(f"Left out: {name}, {reason}.", soft_wrap=True)
