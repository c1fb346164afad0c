"""The lens of the last layer is what the model itself says, and the model is as it was: held on every run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from deltakeeper.errors import LensError
from deltakeeper.lens.decode import decode
from deltakeeper.lens.reading import read_logits
from deltakeeper.lens.streams import Streams

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}
"""By how much of the largest logit a lens may miss the model's own, by dtype: a batch's shape changes kernels."""


@dataclass(frozen=True)
class Identity:
    """How well the lens of the last layer gave the model's own logits.

    Attributes:
        error: largest difference, as a share of the largest logit.
        tolerance: what was allowed.
    """

    error: float
    tolerance: float


def check_identity(model: nn.Module, streams: Streams, *, name: str | None = None, rerun: bool = True) -> Identity:
    """Assert that the lens of the last layer is what the model says, and that the model is as it was.

    Args:
        model: whose streams they are.
        streams: from `capture` with `logits`.
        name: how to call the model in an error; its class by default.
        rerun: whether a plain pass must give the logits of the capture once more, bit for bit.

    Raises:
        LensError: it is not so; the message says which model and how far off.
    """
    called = name or type(model).__name__
    expected = kept_logits(streams, called)
    last = [d.values for d in decode(model, streams, output="logits", layers=[streams.layers - 1])]
    found = compare_logits(torch.cat(last, 1)[0], expected, tolerance_of(model), called)
    if rerun:
        with torch.no_grad():
            require_same_bits(read_logits(model, streams.ids, streams.mask, streams.positions), expected, called)
    return found


def kept_logits(streams: Streams, called: str) -> torch.Tensor:
    """The model's own logits, `(rows, positions, vocabulary)`; raises LensError if they were not kept."""
    if streams.logits is None:
        raise LensError(f"the logits of '{called}' were not kept; ask for them with capture(..., logits=True).")
    return streams.logits


def tolerance_of(model: nn.Module) -> float:
    """What a lens on the model may miss: that of the coarsest dtype it computes in, TensorFloat-32 included."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.float32 in dtypes and torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.float16)  # as many bits as TensorFloat-32 has
    return max((TOLERANCES[dtype] for dtype in dtypes & set(TOLERANCES)), default=TOLERANCES[torch.bfloat16])


def compare_logits(found: torch.Tensor, expected: torch.Tensor, tolerance: float, called: str) -> Identity:
    """Hold a lens to the logits of the model that is called so; raises LensError if it misses them."""
    found, expected = found.float(), expected.float()
    finite = torch.isfinite(expected)
    if found.shape != expected.shape or not torch.equal(finite, torch.isfinite(found)):
        error = math.inf
    else:
        if not finite.all():  # choosing costs more than all that follows
            found, expected = found[finite], expected[finite]
        error = float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
    if not error <= tolerance:
        raise LensError(
            f"the lens of '{called}' misses its own logits at the last layer by {error:.2g} of the largest one, where "
            f"{tolerance:.2g} is allowed; do not read it, as the model does more behind its blocks than the lens sees."
        )
    return Identity(error, tolerance)


def require_same_bits(again: torch.Tensor, before: torch.Tensor, called: str) -> None:
    """Raise LensError unless a pass gives the logits of the one before the lens, bit for bit."""
    if not torch.equal(again, before):
        far = float((again.float() - before.float()).nan_to_num().abs().max())
        raise LensError(
            f"'{called}' gives other logits after the lens than before, by up to {far:.2g}; load it again and look for "
            "hooks or caches that keep something between passes."
        )
