"""The contract of a codec: a delta goes in, a list of packed terms that add up to its approximation comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch

from deltakeeper.layouts.base import Layout


@dataclass(frozen=True)
class Codec(ABC):
    """A compression method with its settings: the dataclass fields are the settings, and nothing else is state.

    A subclass is a frozen dataclass in a file of its own; registering it gives it a command-line spelling
    (`name:field=value,field=value`), a row in the docs and the conformance tests.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    control: ClassVar[bool] = False

    @abstractmethod
    def encode(self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None) -> list[Layout]:
        """Compress one matrix.

        Args:
            delta: `W_tuned - W_base`, float32 `(out, in)`, finite; never modified.
            name: checkpoint name of the tensor, which together with a codec's own seed decides its random numbers.
            tuned: the fine-tuned tensor in its own dtype and shape, for codecs that store values, not differences.

        Returns:
            Terms whose sum approximates `delta`. An all-zero delta gives terms that decode to exactly zero.

        Raises:
            CodecError: a setting does not fit this matrix.
        """


CODECS: dict[str, type[Codec]] = {}
C = TypeVar("C", bound=type[Codec])


def register_codec() -> Callable[[C], C]:
    """Class decorator: make a codec known by its `name`."""

    def add(cls: C) -> C:
        if cls.name in CODECS:
            raise ValueError(f"codec '{cls.name}' is registered twice")
        CODECS[cls.name] = cls
        return cls

    return add
