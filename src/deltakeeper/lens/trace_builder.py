"""Traces of several variants on one prompt from log-probabilities that are there a few layers at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from deltakeeper.lens.trace import LensTrace, TraceMeta
from deltakeeper.lens.trace_batch import HOLD, TOP, TraceBatch
from deltakeeper.lens.traced_text import TracedText


class TraceBuilder:
    """`TraceBatch` of a single prompt; `add` every layer, then `build`.

    Args:
        metas: where each variant's trace comes from, by name; the names of all variants.
        layers: rising numbers of the layers that will be given.
        positions: rising places in `tokens` that they are of.
        tokens: the text that all variants read, token by token.
        final: log-probabilities (P, V) of each variant's last layer, decoded like the layers, for KL to own final.
        references: variants that all are measured against, usually base and fine-tune.
        targets: token ids by name of the set.
        produced: token that each variant would say next at each position; a target of its own.
        spell: the text of a token id.
        top: how many of the likeliest tokens each cell keeps.
        hold: bytes of log-probabilities that may be held for trajectories; with 0, every layer is asked for twice.
    """

    def __init__(
        self,
        metas: Mapping[str, TraceMeta],
        layers: Sequence[int],
        positions: Sequence[int],
        tokens: Sequence[str],
        final: Mapping[str, Tensor],
        *,
        references: Sequence[str] = (),
        targets: Mapping[str, Sequence[int]] | None = None,
        produced: Mapping[str, Sequence[int]] | None = None,
        spell: Callable[[int], str] = str,
        top: int = TOP,
        hold: int = HOLD,
    ) -> None:
        self._batch = TraceBatch(
            [TracedText(metas, positions, tokens, produced)],
            layers,
            final,
            references=references,
            targets=targets,
            spell=spell,
            top=top,
            hold=hold,
        )

    @property
    def missing(self) -> tuple[int, ...]:
        """See `TraceBatch.missing`."""
        return self._batch.missing

    def add(self, layers: Sequence[int], log_probs: Mapping[str, Tensor]) -> None:
        """See `TraceBatch.add`."""
        self._batch.add(layers, log_probs)

    def add_streams(self, layers: Sequence[int], streams: Mapping[str, Tensor], *, base: str, tuned: str) -> None:
        """See `TraceBatch.add_streams`."""
        self._batch.add_streams(layers, streams, base=base, tuned=tuned)

    def build(self) -> dict[str, LensTrace]:
        """The traces by variant; raises as `TraceBatch.build`."""
        return {name: trace for name, (trace,) in self._batch.build().items()}
