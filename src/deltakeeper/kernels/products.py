"""Products of rows of many tenants with one base weight and each tenant's terms, as registered torch operators.

A `table` says which terms a slot has at a module: int64 `(slots, depth)` of `HeldTerm.id`, 0 for nothing; row 0 is the
base and all 0. The graph of a compiled model does not depend on tenants, only the numbers in the table do.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from deltakeeper.errors import KernelError
from deltakeeper.kernels import reference
from deltakeeper.kernels.library import backend
from deltakeeper.kernels.rows import RowGroups

NEVER = 2**62
"""A number of rows that no group has."""

_SCHEMAS = (
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor table, Tensor slots, Tensor starts, int merge_from)"
    " -> Tensor",
    "add_terms(Tensor(a!) y, Tensor x, Tensor table, Tensor slots, Tensor starts) -> ()",
    "add_rows(Tensor(a!) y, Tensor ids, Tensor table, Tensor row_slots) -> ()",
)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    groups: RowGroups,
    *,
    merge_from: int | None = None,
) -> torch.Tensor:
    """`y = x Wᵀ + bias + Σ terms` of each row's slot: `(rows, in) -> (rows, out)` in the dtype of `x`.

    In bfloat16 with the compiled kernels all is summed in float32 and rounded once, and a row's sums do not depend on
    the rows beside it. In other dtypes the base's product is torch's and the terms are added to it.

    Args:
        x: `(rows, in)`, contiguous.
        weight: `(out, in)`, contiguous, of the same dtype.
        bias: `(out,)`, or None.
        table: see above.
        groups: which rows belong to which slot.
        merge_from: groups of at least so many rows may have their terms merged into the weight, tile by tile, and
            rounded to bfloat16 as in a merged checkpoint: faster for long prompts. None keeps them apart always.

    Raises:
        KernelError: shapes, dtypes or slots do not fit.
    """
    ops = _operators()
    try:
        if x.dtype == torch.bfloat16 or backend().name == "torch":
            y: torch.Tensor = ops.linear(
                x, weight, bias, table, groups.slots, groups.starts, NEVER if merge_from is None else merge_from
            )
            return y
        y = F.linear(x, weight, bias)
        ops.add_terms(y, x, table, groups.slots, groups.starts)
        return y
    except (RuntimeError, IndexError) as error:
        raise _refusal("linear", error) from error


def add_terms_(y: torch.Tensor, x: torch.Tensor, table: torch.Tensor, groups: RowGroups) -> None:
    """`y += Σ terms · x` of each row's slot, in place: `(rows, out)`, `(rows, in)`; sums in float32.

    Raises:
        KernelError: shapes, dtypes or slots do not fit.
    """
    try:
        _operators().add_terms(y, x, table, groups.slots, groups.starts)
    except (RuntimeError, IndexError) as error:
        raise _refusal("add_terms", error) from error


def add_rows_(y: torch.Tensor, ids: torch.Tensor, table: torch.Tensor, groups: RowGroups) -> None:
    """`y[row] += Σ term[ids[row]]` of the row's slot, in place, as embeddings need it: `(rows, width)`, `(rows,)`.

    Raises:
        KernelError: shapes, dtypes, slots or ids do not fit.
    """
    try:
        _operators().add_rows(y, ids, table, groups.row_slots)
    except (RuntimeError, IndexError) as error:
        raise _refusal("add_rows", error) from error


@cache
def _operators() -> torch._ops._OpNamespace:
    """The operators, defined by the compiled library or here, with what tracing needs to know of them."""
    if backend().name == "torch":
        fragment = torch.library.Library("deltakeeper", "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema, function in zip(_SCHEMAS, (reference.linear, reference.add_terms, reference.add_rows), strict=True):
            fragment.define(schema)  # type: ignore[no-untyped-call]
            fragment.impl(schema.split("(")[0], function, "CPU")  # type: ignore[no-untyped-call]
        _KEPT.append(fragment)
    torch.library.register_fake("deltakeeper::linear", _linear_shape)
    for name in ("add_terms", "add_rows"):
        torch.library.register_fake(f"deltakeeper::{name}", _nothing)
    return torch.ops.deltakeeper


_KEPT: list[torch.library.Library] = []  # a library that is collected takes its operators along


def _linear_shape(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    merge_from: int,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _nothing(*tensors: torch.Tensor) -> None:
    """An operator that works in place and gives nothing."""


def _refusal(name: str, error: Exception) -> KernelError:
    return KernelError(f"product '{name}' was refused: {str(error).splitlines()[0]}; give tensors that fit each other.")
