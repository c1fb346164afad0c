"""The terms of one tensor while their continuous values are trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from deltakeeper.layouts import Layout

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

    def __init__(self, terms: list[Layout], train: bool) -> None:
        super().__init__()
        self.terms = terms
        self.stored: list[Layout] | None = None
        self.steps = nn.ParameterDict()
        self._values: dict[str, torch.Tensor] = {}
        self._units: dict[str, float] = {}
        for i, term in enumerate(terms):
            for suffix, value in (term.continuous() if train else {}).items():
                key = f"{i}|{suffix}".replace(".", "~")  # a dot would be a path in a module
                unit = float(value.double().square().mean().sqrt()) * (WHOLE if term.replaces else 1.0)
                if unit > 0:
                    self._values[key], self._units[key] = value, unit
                    self.steps[key] = nn.Parameter(torch.zeros_like(value, dtype=torch.float32))

    @property
    def replaces(self) -> bool:
        """Whether they are the value itself instead of a delta."""
        return self.terms[0].replaces

    def dense(self) -> torch.Tensor:
        """The sum of the terms, float32 `(out, in)`, or the value where the only term is one."""
        if self.stored is not None:
            return _total(term.to_dense().float() for term in self.stored)
        return _total(self._part(i) for i in range(len(self.terms)))

    def packed(self) -> list[Layout]:
        """The terms with their trained values.

        Raises:
            LayoutError: a value left what its stored dtype holds.
        """
        return [
            term.replace_continuous(term.continuous() | values) if (values := self._of(i)) else term
            for i, term in enumerate(self.terms)
        ]

    def _part(self, term: int) -> torch.Tensor:
        layout, values = self.terms[term], self._of(term)
        return layout.dense_from(layout.continuous() | values) if values else layout.to_dense().float()

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
        first = first + part
    return first
