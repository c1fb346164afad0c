"""Load the compiled products, choose among them, and say in words which are active and why.

`DELTAKEEPER_KERNELS` is read once, when the first product is asked for: `auto` (the default), one of the instruction
sets `avx512bf16`, `avx512`, `avx2`, `scalar`, or `torch` for plain torch.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from deltakeeper.errors import KernelError

NAME = "_kernels"
VARIABLE = "DELTAKEEPER_KERNELS"
INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "scalar")
CHOICES = ("auto", *INSTRUCTION_SETS, "torch")


@dataclass(frozen=True)
class Backend:
    """What computes products on the CPU: `compiled` with an instruction set, or `torch`; and why."""

    name: str
    isa: str | None
    reason: str


@cache
def backend() -> Backend:
    """The backend of this process, loaded at the first call.

    Raises:
        KernelError: the environment forces one that does not exist, was not built, or that this CPU lacks.
    """
    wanted = os.environ.get(VARIABLE, "auto").strip().lower() or "auto"
    if wanted not in CHOICES:
        raise KernelError(f"{VARIABLE} is {wanted!r}; set it to one of {', '.join(CHOICES)}.")
    if wanted == "torch":
        return Backend("torch", None, f"{VARIABLE}=torch asks for plain torch")
    problem = _load()
    if problem is not None:
        if wanted != "auto":
            raise KernelError(f"{VARIABLE}={wanted} but {problem}; build the package with a C++ compiler, or unset it.")
        warnings.warn(f"compiled kernels are not used: {problem}; plain torch does the work, slowly.", stacklevel=2)
        return Backend("torch", None, problem)
    if wanted == "auto":
        return Backend("compiled", str(torch.ops.deltakeeper.isa()), "the best that this CPU has")
    if not torch.ops.deltakeeper.use_isa(wanted):
        raise KernelError(f"{VARIABLE}={wanted} but this CPU does not have it; choose another, or unset it.")
    return Backend("compiled", wanted, f"{VARIABLE}={wanted} asks for it")


def compiled() -> bool:
    """Whether products run compiled."""
    return backend().name == "compiled"


def library_path() -> Path | None:
    """The compiled library, or None where it was not built."""
    found = sorted(Path(__file__).parent.glob(f"{NAME}.*so"))
    return found[0] if found else None


def _load() -> str | None:
    """Load the library; gives the reason where that cannot be."""
    path = library_path()
    if path is None:
        return "they were not built (no C++ compiler, or no torch, when the package was installed)"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{path.name} does not load ({str(error).splitlines()[0]})"
    return None
