"""The terms of one tensor while their continuous values are trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltakeeper.devices import working_device
from deltakeeper.heal.products import FAST, Product
from deltakeeper.layouts import Dense, Layout, Lowrank, Signs

WHOLE = 0.25
"""Share of its root mean square that is the unit of a tensor that is stored whole: it starts at the fine-tune's own
values. Of 1, 0.3 and 0.1 on a 1-bit SmolLM2-135M the first did far worse than the others."""


class TrainedTerms(nn.Module):
    """The terms of one tensor with steps on their continuous values: `value + unit * step`.

    A unit is the root mean square of a value tensor, so that one learning rate fits scales of any magnitude; `WHOLE`
    of that for a tensor that is stored whole.

    Attributes:
        terms: the terms as they were.
        stored: terms to decode in the place of those in training, or None.
    """

    def __init__(
        self,
        terms: list[Layout],
        train: bool,
        *,
        unpacked: bool = False,
        fixed: Collection[int] = (),
        units: Mapping[tuple[int, str], float] | None = None,
    ) -> None:
        """Lay steps of zero on the values.

        Args:
            terms: the terms of one tensor.
            train: whether they are trained at all.
            unpacked: keep sign planes unpacked, a byte a weight, for products that are several times as fast; by
                default every product makes the delta dense.
            fixed: numbers of terms that are not.
            units: units of values by term and suffix where they are not the root mean square; without one, a tensor of
                zeros is not trained.
        """
        super().__init__()
        self.terms = terms
        self.stored: list[Layout] | None = None
        self.steps = nn.ParameterDict()
        self._products = [Product(term) for term in terms] if unpacked and not terms[0].replaces else None
        self._values: dict[str, torch.Tensor] = {}
        self._units: dict[str, float] = {}
        for i, term in enumerate(terms):
            for suffix, value in (term.continuous() if train and i not in fixed else {}).items():
                key = f"{i}|{suffix}".replace(".", "~")  # a dot would be a path in a module
                unit = float(value.double().square().mean().sqrt()) * (WHOLE if term.replaces else 1.0)
                unit = (units or {}).get((i, suffix), unit)
                if unit > 0:
                    self._values[key], self._units[key] = value.to(self._place(term)), unit
                    self.steps[key] = nn.Parameter(torch.zeros_like(self._values[key], dtype=torch.float32))

    @property
    def replaces(self) -> bool:
        """Whether they are the value itself instead of a delta."""
        return self.terms[0].replaces

    def dense(self) -> torch.Tensor:
        """The sum of the terms, float32 `(out, in)`, or the value where the only term is one."""
        if self.stored is not None:
            return _total(term.to_dense().float() for term in self.stored)
        return _total(self._part(i) for i in range(len(self.terms)))

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """`x @ Dᵀ`: `(..., in) -> (..., out)`, in the dtype of `x`."""
        if self._products is None or self.stored is not None:
            found: torch.Tensor = checkpoint(self._dense_product, x, use_reentrant=False)
            return found
        return _total(part(x, self._all_of(i)) for i, part in enumerate(self._products))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the delta, float32 `(*ids, in)`."""
        if self._products is None or self.stored is not None:
            found: torch.Tensor = checkpoint(self._dense_rows, ids, use_reentrant=False)
            return found
        return _total(part.rows(ids, self._all_of(i)) for i, part in enumerate(self._products))

    def packed(self) -> list[Layout]:
        """The terms with their trained values, on the CPU.

        Raises:
            LayoutError: a value left what its stored dtype holds.
        """
        return [
            term.replace_continuous(term.continuous() | {name: value.cpu() for name, value in values.items()})
            if (values := self._of(i))
            else term
            for i, term in enumerate(self.terms)
        ]

    def _place(self, term: Layout) -> torch.device:
        """Where a term's values are trained: beside the model, unless they meet packed codes, which are on the CPU."""
        alone = isinstance(term, Dense) or (isinstance(term, Lowrank) and term.packed is None)
        beside = alone or (isinstance(term, Signs) and self._products is not None)
        return working_device() if beside else torch.device("cpu")

    def _dense_product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.dense().to(x))

    def _dense_rows(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.dense().to(ids.device))

    def _part(self, term: int) -> torch.Tensor:
        layout, values = self.terms[term], self._of(term)
        return layout.dense_from(layout.continuous() | values) if values else layout.to_dense().float()

    def _all_of(self, term: int) -> dict[str, torch.Tensor]:
        found = self._of(term)
        return self.terms[term].continuous() | found if found or isinstance(self.terms[term], FAST) else {}

    def _of(self, term: int) -> dict[str, torch.Tensor]:
        found = {}
        for key, step in self.steps.items():
            number, suffix = key.replace("~", ".").split("|", 1)
            if int(number) == term:
                found[suffix] = self._values[key] + self._units[key] * step
        return found


def _total(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    first, *others = parts
    for part in others:
        first = first + part.to(first.device)
    return first
