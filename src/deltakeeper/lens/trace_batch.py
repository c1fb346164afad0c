"""Traces of several variants on several prompts from log-probabilities that are there a few layers at a time.

Divergences between variants need two distributions at once, so a layer of all variants is given together. Trajectories
need what is known only at the end, which tokens were ever likely: layers are held while they fit a number of bytes, and
what did not fit is asked for again. All cells of a layer are measured together, whoever's prompt they are of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from deltakeeper.errors import DataError
from deltakeeper.lens.cell_numbers import CellNumbers
from deltakeeper.lens.trace import LensTrace, Numbers
from deltakeeper.lens.traced_text import TracedText

TOP = 5
HOLD = 256 << 20
CURVE_DECIMALS = 5
SLAB = 1 << 16
"""Log-probabilities that are measured at once: temporaries of this many stay in the cache, which halves the time."""


class TraceBatch:
    """Collects the cells of several prompts and variants; `add` every layer, then `build`.

    P below are the positions of all prompts, one prompt behind the other.

    Args:
        texts: the prompts, all of the same variants.
        layers: rising numbers of the layers that will be given.
        final: log-probabilities (P, V) of each variant's last layer, decoded like the layers, for KL to own final.
        references: variants that all are measured against, usually base and fine-tune.
        targets: token ids by name of the set.
        spell: the text of a token id.
        top: how many of the likeliest tokens each cell keeps.
        hold: bytes of log-probabilities that may be held for trajectories; with 0, every layer is asked for twice.
    """

    def __init__(
        self,
        texts: Sequence[TracedText],
        layers: Sequence[int],
        final: Mapping[str, Tensor],
        *,
        references: Sequence[str] = (),
        targets: Mapping[str, Sequence[int]] | None = None,
        spell: Callable[[int], str] = str,
        top: int = TOP,
        hold: int = HOLD,
    ) -> None:
        if any(set(final) != set(text.metas) for text in texts) or not set(references) <= set(final):
            raise ValueError("each variant needs its final log-probabilities, and references are variants")
        self._texts, self._references, self._hold = list(texts), tuple(references), hold
        self._layers, self._spell = [int(layer) for layer in layers], cache(spell)
        cells = len(self._layers), sum(len(text.positions) for text in texts)
        self._cells = {
            name: CellNumbers(cells, min(top, log_p.shape[-1]), log_p, references, targets or {}, self._produced(name))
            for name, log_p in final.items()
        }
        self._unmeasured, self._unfollowed = set(self._layers), set(self._layers)
        self._held: dict[int, Mapping[str, Tensor]] = {}
        self._followed: dict[str, tuple[Tensor, list[int]]] = {}
        self._curves: dict[str, Numbers] = {}

    @property
    def missing(self) -> tuple[int, ...]:
        """Layers to give, at first or once more; none when traces can be built."""
        return tuple(layer for layer in self._layers if layer in self._unmeasured | self._unfollowed - set(self._held))

    def add(self, layers: Sequence[int], log_probs: Mapping[str, Tensor]) -> None:
        """Take some layers of all variants.

        Args:
            layers: their numbers, in any order.
            log_probs: log-softmax by variant, (len(layers), P, V), float32 or float64, on any device. Held without
                copying while they fit, so they must not be written to afterwards.

        Raises:
            ValueError: variants or shapes are not those announced, or values are not log-probabilities.
        """
        self._check(layers, log_probs)
        for i, layer in enumerate(layers):
            given = {name: values[i] for name, values in log_probs.items()}
            if layer in self._unmeasured:
                self._measure(layer, given)
                if self._unmeasured:
                    self._keep(layer, given)
                    continue
                self._choose_followed()
                for held in list(self._held):
                    self._follow(held, self._held.pop(held))
            if layer in self._unfollowed and self._followed:
                self._follow(layer, given)

    def add_streams(self, layers: Sequence[int], streams: Mapping[str, Tensor], *, base: str, tuned: str) -> None:
        """Take streams by variant, (len(layers), P, …), for kept shares and cosines to base and fine-tune."""
        for i, layer in enumerate(layers):
            row = self._layers.index(layer)
            flat = {name: values[i].flatten(1) for name, values in streams.items()}
            for name, cells in self._cells.items():
                cells.shift(row, flat[name], flat[base], flat[tuned])

    def build(self) -> dict[str, list[LensTrace]]:
        """The traces by variant, in the order of the prompts.

        Raises:
            DataError: layers are missing, or the parts do not make a trace.
        """
        if self.missing:
            raise DataError(f"layer {self.missing[0]} has not been given to the lens; add it before building.")
        traces: dict[str, list[LensTrace]] = {}
        for name, cells in self._cells.items():
            ids, counts = self._followed[name]
            words, curves = ids.tolist(), self._curves[name]
            rounded, first = cells.rounded(), 0
            for text in self._texts:
                columns = slice(first, first := first + len(text.positions))
                parts = rounded.of(columns)
                chosen = tuple(
                    dict(zip(words[place][: counts[place]], curves[place], strict=False))
                    for place in range(columns.start, columns.stop)
                )
                spelled = {
                    token for tokens in (*chosen, *(t.ids for t in parts["targets"].values())) for token in tokens
                }
                traces.setdefault(name, []).append(
                    LensTrace(
                        meta=text.metas[name],
                        layers=np.array(self._layers, dtype=np.int32),
                        positions=np.array(text.positions, dtype=np.int32),
                        tokens=tuple(text.tokens),
                        trajectories=chosen,
                        words={token: self._spell(token) for token in sorted(spelled)},
                        **parts,
                    )
                )
        return traces

    def _produced(self, name: str) -> list[int] | None:
        given = [text.produced[name] for text in self._texts if text.produced and name in text.produced]
        return [int(token) for tokens in given for token in tokens] if len(given) == len(self._texts) else None

    def _check(self, layers: Sequence[int], log_probs: Mapping[str, Tensor]) -> None:
        if set(log_probs) != set(self._cells) or not set(layers) <= set(self._layers):
            raise ValueError("a chunk must hold every variant, and layers that were announced")
        for name, values in log_probs.items():
            if values.shape != (len(layers), *self._cells[name].final.shape):
                raise ValueError(f"log-probabilities of {name!r} are not layers × positions × vocabulary")

    def _measure(self, layer: int, given: Mapping[str, Tensor]) -> None:
        row, (cells, vocabulary) = self._layers.index(layer), next(iter(given.values())).shape
        step = max(1, SLAB // vocabulary)
        for first in range(0, cells, step):
            some = slice(first, first + step)
            # Every variant needs them, so they are made once and are in the cache when the next one comes.
            references = {name: (given[name][some], given[name][some].exp()) for name in self._references}
            for name, numbers in self._cells.items():
                if not numbers.measure(row, some, given[name][some], references, own=name):
                    raise ValueError(f"layer {layer} of {name!r} is not log-probabilities; give log-softmax of logits")
        self._unmeasured.remove(layer)

    def _keep(self, layer: int, given: Mapping[str, Tensor]) -> None:
        size = sum(values.nbytes for values in given.values())
        if (len(self._held) + 1) * size <= self._hold:
            self._held[layer] = given

    def _choose_followed(self) -> None:
        """Own top tokens of any layer, and those of the last layer of all variants, so that curves can be compared."""
        last = np.concatenate([cells.top_ids[-1] for cells in self._cells.values()], 1)  # (P, variants × k)
        for name, cells in self._cells.items():
            own = cells.top_ids.transpose(1, 0, 2).reshape(len(last), -1)
            found = [np.unique(row) for row in np.concatenate([own, last], 1)]
            counts = [len(ids) for ids in found]
            # Filled up with a token of the vocabulary; what it gives is not read.
            ids = np.stack([np.pad(row, (0, max(counts) - len(row))) for row in found]).astype(np.int64)
            self._followed[name] = torch.from_numpy(ids), counts
            self._curves[name] = np.zeros((*ids.shape, len(self._layers)), dtype=np.float32)

    def _follow(self, layer: int, given: Mapping[str, Tensor]) -> None:
        row = self._layers.index(layer)
        for name, log_p in given.items():
            probs = log_p.gather(1, self._followed[name][0].to(log_p.device)).double().exp().clamp(0, 1)
            self._curves[name][..., row] = probs.cpu().numpy().round(CURVE_DECIMALS)
        self._unfollowed.remove(layer)
