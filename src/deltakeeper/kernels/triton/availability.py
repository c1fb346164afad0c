"""Whether the Triton kernels can be used here, and why not where they cannot."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from deltakeeper.errors import KernelError


def interpreted() -> bool:
    """Whether Triton is to run its kernels in Python (`TRITON_INTERPRET=1`, read when Triton is first imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def available() -> str | None:
    """Why the kernels cannot be used, as one sentence; None where they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed; install it, or use the kernels for the CPU."
    if not interpreted() and not torch.cuda.is_available():
        return "there is no GPU that torch can use; use the kernels for the CPU."
    return None


def check_runnable(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse to run where the result would be wrong or an error from deep inside Triton.

    Raises:
        KernelError: says why.
    """
    reason = available()
    if reason is not None:
        raise KernelError(f"the Triton kernels cannot run: {reason}")
    if interpreted() and dtype == torch.bfloat16:
        raise KernelError("Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32 with it.")
    if not interpreted() and device.type != "cuda":
        raise KernelError(f"the Triton kernels need tensors on a GPU but these are on '{device}'; move them there.")
