"""What else than the size of an error tells a budget which tensors matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from deltakeeper.errors import CodecError


def check_weigh(weigh: Weigh | None, *, budgeted: bool) -> None:
    """Refuse to weigh errors where no bytes are shared out; raises CodecError."""
    if weigh is not None and not budgeted:
        raise CodecError("layers are spared or starved of a budget's bytes; give a target size or ratio.")


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
