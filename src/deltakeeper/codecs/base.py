"""The contract of a codec: a delta goes in, a list of packed terms that add up to its approximation comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch

from deltakeeper.codecs.box import Box
from deltakeeper.fidelity import Sums
from deltakeeper.layouts.base import Layout


@dataclass(frozen=True)
class Statistics:
    """What one pass over a delta tells of one tensor, for codecs that treat tensors by comparison with each other.

    Attributes:
        shape: `(out, in)`; experts of a 3-D tensor are counted as rows.
        std: standard deviation of the delta's entries.
        mean_abs: mean absolute entry.
        zeros: share of exact zeros.
    """

    shape: tuple[int, int]
    std: float
    mean_abs: float
    zeros: float


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the layer of one matrix was fed on calibration text.

    Attributes:
        gram: mean over tokens of `xᵀx`, float32 `(in, in)`, symmetric.
        mean: mean over tokens of `x`, float32 `(in,)`.
        tokens: number of tokens that were averaged.
    """

    gram: torch.Tensor
    mean: torch.Tensor
    tokens: int


class RowEncoder(ABC):
    """Encodes one matrix from blocks of rows, so that neither it nor its delta is ever whole in memory."""

    @abstractmethod
    def add(self, base: torch.Tensor, tuned: torch.Tensor) -> None:
        """Take the next rows, `(rows, in)` of base and fine-tune, float32, float16 or bfloat16."""

    @abstractmethod
    def finish(self) -> tuple[list[Layout], Sums]:
        """The same terms as `Codec.encode` gives for the whole delta, and how near they are to it.

        Raises:
            CodecError: the delta holds NaN or infinity, or does not fit the codec.
        """


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
    boxless: ClassVar[str] = "it is not declared"

    @property
    def uses_inputs(self) -> bool:
        """Whether `encode` wants the inputs of the layer on calibration text, with these settings."""
        return False

    @property
    def surveys(self) -> bool:
        """Whether `spread` gives tensors different settings, so that a pass over the delta comes first."""
        return False

    @property
    def unbiased(self) -> bool:
        """Whether what is dropped at random is made up for: the mean is right, but the error may exceed the delta.

        To drop everything would then have the least error at few bytes, so a budget does not offer that.
        """
        return False

    @property
    def row_by_row(self) -> bool:
        """Whether rows are encoded alike and apart, so that the error on some of them tells that on all."""
        return False

    def spread(self, survey: Mapping[str, Statistics]) -> dict[str, Codec]:
        """A codec for each tensor; the same one, unless the method treats tensors by comparison with each other."""
        return dict.fromkeys(survey, self)

    def encode_rows(self, shape: tuple[int, int], *, name: str) -> RowEncoder | None:
        """An encoder from blocks of rows, for methods that need no more than one pass; None for the others."""
        return None

    def payload_bytes(self, shape: tuple[int, int]) -> int | None:
        """Bytes of what `encode` gives for every delta of this shape, or None where they depend on the data."""
        return None

    def expected_bytes(self, shape: tuple[int, int]) -> int | None:
        """The best guess at `payload_bytes` from shape and settings, or None where they tell nothing."""
        return self.payload_bytes(shape)

    def box(self, delta: torch.Tensor, *, name: str) -> Box | None:
        """The deltas that `encode` gives the same terms for as for this one, up to rounding; None where none is known.

        It is what the codec does not see, without inputs of the layer: where an attacker who knows the codec can change
        a fine-tune and leave what is served as it was. A codec without one says why in `boxless`.

        Args:
            delta: as for `encode`; kept in the box, so not to be modified later.
            name: as for `encode`.
        """
        return None

    @abstractmethod
    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """Compress one matrix.

        Args:
            delta: `W_tuned - W_base`, float32 `(out, in)`, finite; never modified.
            name: checkpoint name of the tensor, which together with a codec's own seed decides its random numbers.
            tuned: the fine-tuned tensor in its own dtype and shape, for codecs that store values, not differences.
            inputs: what the layer was fed, for codecs that weigh errors by it; None where there is no calibration, and
                for tensors that no linear layer owns, where such a codec falls back to equal weights.

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
