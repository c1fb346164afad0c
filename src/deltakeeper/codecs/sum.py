"""Sums of codecs: each one encodes what those before it left over, so "1-bit plus rank 8" needs no code of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from deltakeeper.codecs.base import Codec, Inputs, Statistics
from deltakeeper.codecs.box import Box
from deltakeeper.codecs.cells import Cells
from deltakeeper.codecs.matrices import checked
from deltakeeper.errors import CodecError
from deltakeeper.layouts.base import Layout


@dataclass(frozen=True)
class SumCodec(Codec):
    """`parts[0]` of the delta, then `parts[1]` of the residual, and so on; spelled `a+b`.

    Attributes:
        parts: two or more codecs, none of them a sum.
    """

    name: ClassVar[str] = "sum"
    title: ClassVar[str] = "Sum of codecs"
    summary: ClassVar[str] = "each codec encodes what the previous ones left over"
    paper: ClassVar[str] = ""

    parts: tuple[Codec, ...]

    def __post_init__(self) -> None:
        if len(self.parts) < 2 or not all(isinstance(p, Codec) and not isinstance(p, SumCodec) for p in self.parts):
            raise CodecError("a sum needs two or more codecs, none of them a sum; write them as a+b.")

    @property
    def uses_inputs(self) -> bool:
        """Whether one of the parts does."""
        return any(part.uses_inputs for part in self.parts)

    @property
    def unbiased(self) -> bool:
        """Whether one of the parts is."""
        return any(part.unbiased for part in self.parts)

    @property
    def row_by_row(self) -> bool:
        """Whether all of the parts are."""
        return all(part.row_by_row for part in self.parts)

    @property
    def surveys(self) -> bool:
        """Whether one of the parts does."""
        return any(part.surveys for part in self.parts)

    def spread(self, survey: Mapping[str, Statistics]) -> dict[str, Codec]:
        """Each part spread over the tensors, all by the statistics of the delta itself."""
        each = [part.spread(survey) for part in self.parts]
        return {name: SumCodec(tuple(found[name] for found in each)) for name in survey}

    def payload_bytes(self, shape: tuple[int, int]) -> int | None:
        """What the parts take together."""
        return _added(part.payload_bytes(shape) for part in self.parts)

    def expected_bytes(self, shape: tuple[int, int]) -> int | None:
        """What the parts are expected to take together."""
        return _added(part.expected_bytes(shape) for part in self.parts)

    def encode(
        self, delta: torch.Tensor, *, name: str, tuned: torch.Tensor | None = None, inputs: Inputs | None = None
    ) -> list[Layout]:
        """See `Codec.encode`; parts never see `tuned`, because a value cannot be added to."""
        left_over = checked(delta, name).clone()
        terms: list[Layout] = []
        for index, (own, part) in enumerate(self._named(name)):
            found = part.encode(left_over, name=own, inputs=inputs)
            terms += found
            if index + 1 < len(self.parts):
                for term in found:
                    left_over -= term.to_dense()
        return terms

    def box(self, delta: torch.Tensor, *, name: str) -> Box | None:
        """What is in the box of every part, where all of them are intervals and at most one keeps a mean."""
        matrix = checked(delta, name)
        left_over = matrix.clone()
        found: Cells | None = Cells.holding(matrix, torch.zeros_like(matrix, dtype=torch.bool), torch.inf)
        for own, part in self._named(name):
            box = part.box(left_over.clone(), name=own)
            if found is None or not isinstance(box, Cells):
                return None
            found = found.meet(box, matrix - left_over)
            for term in part.encode(left_over, name=own):
                left_over -= term.to_dense()
        return found

    def _named(self, name: str) -> Iterator[tuple[str, Codec]]:
        """The parts with their own names, or a second random part would draw what the first one drew."""
        for index, part in enumerate(self.parts):
            twins = sum(type(other) is type(part) for other in self.parts[:index])
            yield f"{name}+{twins}" if twins else name, part


def _added(sizes: Iterable[int | None]) -> int | None:
    known = list(sizes)
    return None if None in known else sum(size for size in known if size is not None)
