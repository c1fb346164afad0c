"""`deltakeeper kernels`."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from deltakeeper.commands.output import console, print_json


def kernels(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Show which products and passes are active on this machine, and why.

    DELTAKEEPER_KERNELS forces an instruction set (avx512bf16, avx512, avx2, scalar) or plain torch.

    Example: deltakeeper kernels
    """
    import torch

    from deltakeeper.kernels import backend
    from deltakeeper.kernels.triton import available
    from deltakeeper.native import native_status

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that compiled kernels are not used is what is told below
        active = backend()
    attention = active.name == "compiled" and hasattr(torch.ops.deltakeeper, "paged_attention")
    problem = available()
    if as_json:
        print_json(
            {
                "products": {"name": active.name, "isa": active.isa, "reason": active.reason},
                "attention": "compiled" if attention else "torch",
                "triton": {"available": problem is None, "reason": problem},
                "passes": native_status(),
                "threads": torch.get_num_threads(),
            }
        )
        return
    chosen = active.name if active.isa is None else f"{active.name}, {active.isa}"
    lines = (
        f"Products on the CPU: {chosen} ({active.reason}); threads: {torch.get_num_threads()}.",
        f"Attention on the CPU: {'compiled' if attention else 'plain torch'}.",
        f"Products on a GPU (Triton): {'usable.' if problem is None else f'not usable, {problem}'}",
        f"Passes over whole models: {native_status()}",
    )
    console().print("\n".join(lines), soft_wrap=True, markup=False)
