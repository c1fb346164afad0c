"""The contract of a foreign delta: which tensors it changes, and the terms that hold each change exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from deltakeeper.checkpoint import TensorInfo
from deltakeeper.layouts import Layout


@dataclass(frozen=True)
class Imported:
    """How one tensor is stored.

    Attributes:
        terms: terms that add up to the delta, or one dense value.
        transposed: whether the checkpoint holds the tensor `(in, out)`, as GPT-2's Conv1D.
    """

    terms: Sequence[Layout]
    transposed: bool = False


class ForeignDelta(ABC):
    """A delta in another tool's format, over an opened base.

    Attributes:
        path: file or folder.
        name_or_path: what it was asked for by.
        tensors: every tensor of the fine-tune, by name.
    """

    kind: ClassVar[str]

    path: Path
    name_or_path: str
    tensors: dict[str, TensorInfo]

    @abstractmethod
    def read(self, name: str) -> Imported | None:
        """What the file does to a tensor, or None where it leaves the base's.

        Raises:
            CheckpointError: the file is damaged, or does not fit the base.
        """
