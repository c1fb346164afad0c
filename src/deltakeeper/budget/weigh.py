"""What else than the size of an error tells a budget which tensors matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol


class Weigh(Protocol):
    """Multiplies errors, tensor by tensor."""

    @property
    def option(self) -> str:
        """Name of the option of `deltakeeper compress` that says the same."""

    @property
    def source(self) -> str:
        """Value of that option."""

    def weights(self, names: Iterable[str]) -> Mapping[str, float]:
        """What the error of each tensor is multiplied by, above 0; 1 for those that are left out."""
