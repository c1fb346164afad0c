"""Several models under the lens on the same prompts, side by side; here those that are in memory already."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from deltakeeper.errors import LensError
from deltakeeper.lens.decode import MEMORY, Decoded, Output, finish, plan_chunks
from deltakeeper.lens.identity import Identity, compare_logits, kept_logits, require_same_bits, tolerance_of
from deltakeeper.lens.positions import resolve_positions
from deltakeeper.lens.reading import Around, read_logits
from deltakeeper.lens.streams import Part, Streams, capture
from deltakeeper.lens.tail import Tail


@dataclass(frozen=True)
class Texts:
    """Prompts of a batch, in chunks.

    Attributes:
        ids: int64 `(rows, length)`.
        mask: the same shape.
        positions: int64 `(rows, positions)`.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, mask: torch.Tensor | None, positions: Sequence[int] | torch.Tensor | None) -> Texts:
        """Arguments of `capture`, with positions counted from the start of each row's own text."""
        mask = torch.ones_like(ids) if mask is None else mask.to(ids)
        return cls(ids, mask, resolve_positions(mask, positions) - mask.argmax(1)[:, None])

    def split(self, rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """So many rows at a time."""
        for start in range(0, len(self.ids), rows):
            some = slice(start, start + rows)
            yield self.ids[some], self.mask[some], self.positions[some]


class Compared(ABC):
    """Models of one tokenizer, read on the same prompts, decoded so that all of a chunk are in memory at once.

    Attributes:
        names: of the models, in order.
    """

    model: nn.Module

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice or not self.names:
            raise LensError(f"two variants are called '{twice[0]}'." if twice else "there is no model to compare.")

    @abstractmethod
    def capture(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: Sequence[int] | torch.Tensor | None = None,
        parts: Sequence[Part] = ("block",),
        *,
        logits: bool = True,
    ) -> dict[str, Streams]:
        """Streams by name; see `deltakeeper.lens.capture`."""

    @abstractmethod
    def serving(self, name: str) -> AbstractContextManager[tuple[nn.Module, Around | None]]:
        """One of the models alone, and the context that its passes run in; raises LensError for an unknown name."""

    def decode(
        self,
        captured: Mapping[str, Streams],
        *,
        tail: str | None = None,
        output: Output = "log_probs",
        part: Part = "block",
        layers: Sequence[int] | None = None,
        memory: int = MEMORY,
    ) -> Iterator[dict[str, Decoded]]:
        """The same layers and rows of every model, chunk by chunk; all layers of some rows before the next rows.

        Args:
            captured: from `capture`.
            tail: name of the model whose tail reads them all, such as the base; each its own by default.
            output: natural logarithms of probabilities, or logits.
            part: see `deltakeeper.lens.decode`.
            layers: ascending; all by default.
            memory: bytes that a chunk of all models may take.

        Raises:
            LensError: see `deltakeeper.lens.decode`; or there is no model of the tail's name.
        """
        if tail is not None and tail not in self.names:
            raise LensError(f"there is no '{tail}' whose tail could be used; name one of {', '.join(self.names)}.")
        first = captured[self.names[0]]
        wanted = list(range(first.layers)) if layers is None else [range(first.layers)[i] for i in layers]
        tails = self._tails(captured)
        cells = first.positions.shape[1] * len(self.names)
        widest = max(t.vocabulary for t in tails.values())
        for rows, some in plan_chunks(first.rows, wanted, cells, widest, memory):
            span = slice(rows.start, rows.stop)
            streams = {name: captured[name].part(part)[list(some), span] for name in self.names}
            logits = self._logits(tails, streams, first.tokens[span], tail)
            yield {name: Decoded(some, rows, finish(logits[name], output)) for name in self.names}

    def check_identity(self, captured: Mapping[str, Streams], *, rerun: bool = True) -> dict[str, Identity]:
        """`deltakeeper.lens.check_identity` of every model; raises LensError that names the one that fails."""
        last = captured[self.names[0]].layers - 1
        pieces: dict[str, list[torch.Tensor]] = {name: [] for name in self.names}
        for chunk in self.decode(captured, output="logits", layers=[last]):
            for name, decoded in chunk.items():
                pieces[name].append(decoded.values[0])
        again = self._again(captured) if rerun else {}
        found = {}
        for name in self.names:
            expected = kept_logits(captured[name], name)
            found[name] = compare_logits(torch.cat(pieces[name]), expected, self._tolerance(name), name)
            if rerun:
                require_same_bits(again[name], expected, name)
        return found

    def _require_known(self, name: str) -> None:
        if name not in self.names:
            raise LensError(f"there is no variant '{name}'; name one of {', '.join(self.names)}.")

    def _tolerance(self, name: str) -> float:
        return tolerance_of(self.model)

    @abstractmethod
    def _tails(self, captured: Mapping[str, Streams]) -> dict[str, Tail]: ...

    @abstractmethod
    def _logits(
        self, tails: Mapping[str, Tail], streams: Mapping[str, torch.Tensor], tokens: torch.Tensor, tail: str | None
    ) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def _again(self, captured: Mapping[str, Streams]) -> dict[str, torch.Tensor]: ...


class Models(Compared):
    """Models that are in memory already, one after the other, with the interface of `Variants`."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        """Compare models by name, the base first."""
        super().__init__(tuple(models))
        self.models = dict(models)

    def capture(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: Sequence[int] | torch.Tensor | None = None,
        parts: Sequence[Part] = ("block",),
        *,
        logits: bool = True,
    ) -> dict[str, Streams]:
        """See `deltakeeper.lens.capture`."""
        return {n: capture(m, ids, mask, positions, parts, logits=logits) for n, m in self.models.items()}

    def serving(self, name: str) -> AbstractContextManager[tuple[nn.Module, Around | None]]:
        """See `Compared.serving`."""
        self._require_known(name)
        return nullcontext((self.models[name], None))

    def _tolerance(self, name: str) -> float:
        return tolerance_of(self.models[name])

    def _tails(self, captured: Mapping[str, Streams]) -> dict[str, Tail]:
        return {name: Tail.of(model, captured[name].tokens) for name, model in self.models.items()}

    def _logits(
        self, tails: Mapping[str, Tail], streams: Mapping[str, torch.Tensor], tokens: torch.Tensor, tail: str | None
    ) -> dict[str, torch.Tensor]:
        rows = torch.arange(len(tokens))
        return {name: tails[tail or name].read(streams[name], tokens, rows, None) for name in self.names}

    @torch.no_grad()
    def _again(self, captured: Mapping[str, Streams]) -> dict[str, torch.Tensor]:
        return {n: read_logits(m, s.ids, s.mask, s.positions) for n, m in self.models.items() for s in [captured[n]]}
