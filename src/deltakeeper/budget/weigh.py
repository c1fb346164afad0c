"""What else than the size of an error tells a budget which tensors matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from deltakeeper.checkpoint import Checkpoint
from deltakeeper.delta import DeltaPair
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

    def check_pair(self, base: Checkpoint, tuned: Checkpoint) -> None:
        """Refuse a pair whose errors it cannot weigh; raises DeltakeeperError."""

    def weights(self, names: Iterable[str]) -> Mapping[str, float]:
        """What the error of each tensor is multiplied by, above 0; 1 for those that are left out."""


def weigh_errors(weigh: Weigh | None, models: DeltaPair) -> Mapping[str, float] | None:
    """What the error of each tensor of a pair is multiplied by; None where all count alike.

    Raises:
        DeltakeeperError: the weights are those of another pair.
    """
    if weigh is None:
        return None
    weigh.check_pair(models.base, models.tuned)
    return weigh.weights(models.names())
