"""Many variants of one base under the lens: tenants of an overlay in one batch, and whole weights beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.attach import Change, attached
from deltakeeper.errors import LensError
from deltakeeper.kernels.rows import RowGroups
from deltakeeper.lens.models import Compared, Texts
from deltakeeper.lens.reading import Around, read_logits
from deltakeeper.lens.streams import Part, Streams, capture, join
from deltakeeper.lens.tail import Tail
from deltakeeper.overlay import Overlay, TenantDelta, attach

BASE = "base"


@dataclass(frozen=True)
class Compressed:
    """A delta as it is to be read, and how many of its sign planes; all by default."""

    artifact: DeltaArtifact
    planes: int | None = None


class Variants(Compared):
    """A live base, its compressed variants in the same batch, and variants of other weights, for a `with` block.

    The rows of a batch are ordered variant by variant, the base first, so that what is read of the base's weights
    serves them all. Afterwards the model is as it was.

    Attributes:
        names: the base, then the compressed variants, then the whole ones, as they were given.
    """

    def __init__(
        self,
        model: nn.Module | Overlay,
        compressed: Mapping[str, DeltaArtifact | Compressed] | None = None,
        *,
        whole: Mapping[str, Iterable[Change]] | None = None,
        base: str = BASE,
        prompts_per_pass: int | None = None,
    ) -> None:
        """Say what is to be compared; nothing is touched before the `with` block.

        Args:
            model: the base, a Hugging Face decoder in evaluation mode on the CPU; or an overlay on it that lives on.
            compressed: deltas by name, made from this very base.
            whole: changes by name, such as `weights_of` gives for the fine-tune; each is held in memory as a whole and
                takes a pass of its own.
            base: name of the base.
            prompts_per_pass: prompts of all variants that are read at once; all by default.

        Raises:
            LensError: two variants have one name.
        """
        compressed = compressed or {}
        self._whole = {name: list(changes) for name, changes in (whole or {}).items()}
        self._compressed = {n: c if isinstance(c, Compressed) else Compressed(c) for n, c in compressed.items()}
        super().__init__((base, *self._compressed, *self._whole))
        self._given, self._prompts = model, prompts_per_pass
        self.model: nn.Module = model.model if isinstance(model, Overlay) else model
        self._overlay: Overlay | None = None
        self._slots: dict[str, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Load and publish the deltas; raises OverlayError where one does not fit."""
        with ExitStack() as stack:
            if self._compressed:
                given = self._given
                overlay = given if isinstance(given, Overlay) else attach(given)
                if overlay is not given:
                    stack.callback(overlay.detach)
                for name, one in self._compressed.items():
                    delta = overlay.load(one.artifact, planes=one.planes)
                    stack.callback(_withdraw, overlay, delta)
                    self._slots[name] = overlay.publish(delta)
                self._overlay = overlay
            self._slots[self.names[0]] = 0
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Retire the deltas, and detach the overlay if it was not given."""
        self._overlay, self._slots = None, {}
        self._stack.close()

    def capture(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: Sequence[int] | torch.Tensor | None = None,
        parts: Sequence[Part] = ("block",),
        *,
        logits: bool = True,
    ) -> dict[str, Streams]:
        """Streams of every variant on the same prompts; see `deltakeeper.lens.capture`, whose errors it raises."""
        self._require_open()
        texts = Texts.of(ids, mask, positions)
        pieces: dict[str, list[Streams]] = {name: [] for name in self.names}
        for ids, mask, own in texts.split(self._prompts or len(texts.ids)):
            for names in self._together(None):
                with self._weights_of(names[0]):
                    all_ids, all_masks, places = (t.repeat(len(names), 1) for t in (ids, mask, own))
                    around = self._around(names, len(ids))
                    found = capture(self.model, all_ids, all_masks, places, parts, logits=logits, around=around)
                for place, name in enumerate(names):
                    pieces[name].append(found.select(slice(place * len(ids), (place + 1) * len(ids))))
        return {name: join(found) for name, found in pieces.items()}

    @contextmanager
    def serving(self, name: str) -> Iterator[tuple[nn.Module, Around | None]]:
        """One variant alone; see `Compared.serving`."""
        self._require_open()
        self._require_known(name)
        one = self._around([name], 1)
        with self._weights_of(name):
            yield self.model, None if one is None else lambda rows, *sizes: one(torch.zeros_like(rows), *sizes)

    def _tails(self, captured: Mapping[str, Streams]) -> dict[str, Tail]:
        self._require_open()
        tail = Tail.of(self.model, captured[self.names[0]].tokens)
        # Tenants with tokens of their own widen everyone's logits.
        widest = max(tail.vocabulary, 0 if self._overlay is None else self._overlay.vocabulary)
        return dict.fromkeys(self.names, replace(tail, vocabulary=widest))

    def _logits(
        self, tails: Mapping[str, Tail], streams: Mapping[str, torch.Tensor], tokens: torch.Tensor, tail: str | None
    ) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        count = len(tokens)
        for names in self._together(tail):
            readers = names if tail is None else [tail] * len(names)
            stacked = torch.cat([streams[name] for name in names], 1)
            rows, around = torch.arange(stacked.shape[1]), self._around(readers, count)
            with self._weights_of(readers[0]):
                logits = tails[names[0]].read(stacked, tokens.repeat(len(names), 1), rows, around)
            found |= zip(names, logits.chunk(len(names), 1), strict=True)
        return found

    @torch.no_grad()
    def _again(self, captured: Mapping[str, Streams]) -> dict[str, torch.Tensor]:
        found: dict[str, list[torch.Tensor]] = {name: [] for name in self.names}
        first = captured[self.names[0]]
        texts = Texts(first.ids, first.mask, first.positions)
        for ids, mask, columns in texts.split(self._prompts or len(texts.ids)):
            for names in self._together(None):
                all_ids, all_masks, places = (t.repeat(len(names), 1) for t in (ids, mask, columns))
                with self._weights_of(names[0]):
                    logits = read_logits(self.model, all_ids, all_masks, places, self._around(names, len(ids)))
                for name, own in zip(names, logits.chunk(len(names)), strict=True):
                    found[name].append(own)
        return {name: torch.cat(pieces) for name, pieces in found.items()}

    def _together(self, tail: str | None) -> list[list[str]]:
        """Names that share a pass: all tenants of the overlay; or everyone, where one tail reads them all."""
        if tail is not None:
            return [list(self.names)]
        return [[n for n in self.names if n not in self._whole], *([n] for n in self._whole)]

    def _around(self, names: Sequence[str], count: int) -> Around | None:
        """The overlay's row groups for `count` rows of each name; None where the model computes alone."""
        overlay = self._overlay
        if overlay is None or names[0] in self._whole:
            return None
        slots = torch.tensor([self._slots[name] for name in names]).repeat_interleave(count)

        def around(rows: torch.Tensor, tokens: int, reached: int) -> AbstractContextManager[None]:
            own = slots[rows]
            body = RowGroups.of(own.repeat_interleave(tokens))
            return overlay.rows(body, None if reached == tokens else RowGroups.of(own.repeat_interleave(reached)))

        return around

    def _weights_of(self, name: str) -> AbstractContextManager[Any]:
        return attached(self.model, self._whole[name]) if name in self._whole else nullcontext()

    def _require_open(self) -> None:
        if not self._slots:
            raise LensError("these variants are not open; use them inside of `with Variants(...) as variants:`.")


def _withdraw(overlay: Overlay, delta: TenantDelta) -> None:
    if delta.slot is not None and overlay.published.get(delta.slot) is delta:
        overlay.retire(delta.slot)
    delta.close()
