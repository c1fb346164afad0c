"""Products of rows of many tenants with one base weight and each tenant's terms, as registered torch operators.

A `table` says which terms a slot has at a module: int64 `(slots, depth)` of `HeldTerm.id`, 0 for nothing; row 0 is the
base and all 0. The graph of a compiled model does not depend on tenants, only the numbers in the table do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from deltakeeper.kernels import reference
from deltakeeper.kernels.library import backend
from deltakeeper.kernels.registration import Operator, Operators, nothing, refusal
from deltakeeper.kernels.rows import RowGroups

NEVER = 2**62
"""A number of rows that no group has."""


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
    ops = _OPERATORS.ready()
    try:
        if x.dtype == torch.bfloat16 or backend().name == "torch":
            y: torch.Tensor = ops[0](
                x, weight, bias, table, groups.slots, groups.starts, NEVER if merge_from is None else merge_from
            )
            return y
        y = F.linear(x, weight, bias)
        ops[2](y, x, table, groups.slots, groups.starts)
        return y
    except (RuntimeError, IndexError) as error:
        raise refusal("linear", error) from error


def linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    tables: torch.Tensor,
    groups: RowGroups,
    *,
    merge_from: int | None = None,
) -> list[torch.Tensor]:
    """Several `linear` of one `x` at once, such as queries, keys and values: what they share is made once.

    Args:
        x: bfloat16 `(rows, in)`, contiguous.
        weights: each `(out, in)`, contiguous, of the same dtype.
        tables: int64 `(weights, slots, depth)`, contiguous.
        groups: which rows belong to which slot.
        merge_from: see `linear`.

    Raises:
        KernelError: shapes, dtypes or slots do not fit.
    """
    most = NEVER if merge_from is None else merge_from
    try:
        y: list[torch.Tensor] = _OPERATORS.ready()[1](x, weights, tables, groups.slots, groups.starts, most)
        return y
    except (RuntimeError, IndexError) as error:
        raise refusal("linears", error) from error


def add_terms_(y: torch.Tensor, x: torch.Tensor, table: torch.Tensor, groups: RowGroups) -> None:
    """`y += Σ terms · x` of each row's slot, in place: `(rows, out)`, `(rows, in)`; sums in float32.

    Raises:
        KernelError: shapes, dtypes or slots do not fit.
    """
    try:
        _OPERATORS.ready()[2](y, x, table, groups.slots, groups.starts)
    except (RuntimeError, IndexError) as error:
        raise refusal("add_terms", error) from error


def add_rows_(y: torch.Tensor, ids: torch.Tensor, table: torch.Tensor, groups: RowGroups) -> None:
    """`y[row] += Σ term[ids[row]]` of the row's slot, in place, as embeddings need it: `(rows, width)`, `(rows,)`.

    Raises:
        KernelError: shapes, dtypes, slots or ids do not fit.
    """
    try:
        _OPERATORS.ready()[3](y, ids, table, groups.row_slots)
    except (RuntimeError, IndexError) as error:
        raise refusal("add_rows", error) from error


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


def _linears_shapes(x: torch.Tensor, weights: list[torch.Tensor], *rest: object) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


_OPERATORS = Operators(
    Operator(
        "linear(Tensor x, Tensor weight, Tensor? bias, Tensor table, Tensor slots, Tensor starts, int merge_from)"
        " -> Tensor",
        reference.linear,
        _linear_shape,
    ),
    Operator(
        "linears(Tensor x, Tensor[] weights, Tensor tables, Tensor slots, Tensor starts, int merge_from) -> Tensor[]",
        reference.linears,
        _linears_shapes,
    ),
    Operator(
        "add_terms(Tensor(a!) y, Tensor x, Tensor table, Tensor slots, Tensor starts) -> ()",
        reference.add_terms,
        nothing,
    ),
    Operator("add_rows(Tensor(a!) y, Tensor ids, Tensor table, Tensor row_slots) -> ()", reference.add_rows, nothing),
)
