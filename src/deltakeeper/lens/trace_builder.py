"""Traces of several variants from log-probabilities that are there a few layers at a time.

Divergences between variants need two distributions at once, so a layer of all variants is given together. Trajectories
need what is known only at the end, which tokens were ever likely: layers are held while they fit a number of bytes, and
what did not fit is asked for again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from deltakeeper.errors import DataError
from deltakeeper.lens.cell_numbers import CellNumbers
from deltakeeper.lens.trace import LensTrace, Numbers, TraceMeta, Whole
from deltakeeper.lens.trace_json import round_numbers

TOP = 5
HOLD = 256 << 20
CURVE_DECIMALS = 5
_NORMALISED = 1e-2


class TraceBuilder:
    """Collects one prompt's cells of several variants; `add` every layer, then `build`.

    Args:
        metas: where each variant's trace comes from, by name; the names of all variants.
        layers: rising numbers of the layers that will be given.
        positions: rising places in `tokens` that they are of.
        tokens: the text that all variants read, token by token.
        final: log-probabilities (P, V) of each variant's last layer, decoded like the layers, for KL to own final.
        references: variants that all are measured against, usually base and fine-tune.
        targets: token ids by name of the set.
        produced: token that came next at each position, by variant; a target of its own.
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
        if set(final) != set(metas) or not set(references) <= set(metas):
            raise ValueError("each variant needs its final log-probabilities, and references are variants")
        self._metas, self._references, self._spell, self._hold = dict(metas), tuple(references), spell, hold
        self._layers, self._tokens = [int(layer) for layer in layers], tuple(tokens)
        self._positions: Whole = np.array(positions, dtype=np.int32)
        cells = len(self._layers), len(self._positions)
        self._cells = {
            name: CellNumbers(
                cells,
                min(top, final[name].shape[-1]),
                final[name],
                self._references,
                targets or {},
                (produced or {}).get(name),
            )
            for name in metas
        }
        self._unmeasured, self._unfollowed = set(self._layers), set(self._layers)
        self._held: dict[int, Mapping[str, Tensor]] = {}
        self._followed: dict[str, list[Tensor]] = {}
        self._curves: dict[str, list[Numbers]] = {}

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

    def build(self) -> dict[str, LensTrace]:
        """The traces by variant.

        Raises:
            DataError: layers are missing, or the parts do not make a trace.
        """
        if self.missing:
            raise DataError(f"layer {self.missing[0]} has not been given to the lens; add it before building.")
        return {name: self._trace(name, cells) for name, cells in self._cells.items()}

    def _check(self, layers: Sequence[int], log_probs: Mapping[str, Tensor]) -> None:
        if set(log_probs) != set(self._metas) or not set(layers) <= set(self._layers):
            raise ValueError("a chunk must hold every variant, and layers that were announced")
        for name, values in log_probs.items():
            if values.shape != (len(layers), *self._cells[name].final.shape):
                raise ValueError(f"log-probabilities of {name!r} are not layers × positions × vocabulary")

    def _measure(self, layer: int, given: Mapping[str, Tensor]) -> None:
        for name, log_p in given.items():
            if not (log_p.logsumexp(-1).abs() < _NORMALISED).all():
                raise ValueError(f"layer {layer} of {name!r} is not log-probabilities; give log-softmax of logits")
        for name, cells in self._cells.items():
            cells.measure(self._layers.index(layer), given[name], {other: given[other] for other in self._references})
        self._unmeasured.remove(layer)

    def _keep(self, layer: int, given: Mapping[str, Tensor]) -> None:
        size = sum(values.nbytes for values in given.values())
        if (len(self._held) + 1) * size <= self._hold:
            self._held[layer] = given

    def _choose_followed(self) -> None:
        """Own top tokens of any layer, and those of the last layer of all variants, so that curves can be compared."""
        for place in range(len(self._positions)):
            last = {int(token) for cells in self._cells.values() for token in cells.top_ids[-1, place]}
            for name, cells in self._cells.items():
                ids = sorted(last | set(cells.top_ids[:, place].ravel().tolist()))
                self._followed.setdefault(name, []).append(torch.tensor(ids))
                self._curves.setdefault(name, []).append(np.zeros((len(ids), len(self._layers)), dtype=np.float32))

    def _follow(self, layer: int, given: Mapping[str, Tensor]) -> None:
        row = self._layers.index(layer)
        for name, log_p in given.items():
            for place, ids in enumerate(self._followed[name]):
                probs = log_p[place, ids.to(log_p.device)].double().exp().clamp(0, 1)
                self._curves[name][place][:, row] = probs.cpu().numpy().round(CURVE_DECIMALS)
        self._unfollowed.remove(layer)

    def _trace(self, name: str, cells: CellNumbers) -> LensTrace:
        curves = [
            dict(zip(ids.tolist(), values, strict=True))
            for ids, values in zip(self._followed[name], self._curves[name], strict=True)
        ]
        spelled = {token for tokens in (*curves, *cells.ids.values()) for token in tokens}
        return LensTrace(
            meta=self._metas[name],
            layers=np.array(self._layers, dtype=np.int32),
            positions=self._positions.copy(),
            tokens=self._tokens,
            top_ids=cells.top_ids.copy(),
            top_probs=round_numbers(cells.top_probs),
            entropy=round_numbers(cells.entropy),
            kl_final=round_numbers(cells.kl_final),
            kl={other: round_numbers(values) for other, values in cells.kl.items()},
            js={other: round_numbers(values) for other, values in cells.js.items()},
            targets=cells.targets(),
            shift={part: round_numbers(values) for part, values in cells.parts.items()},
            trajectories=tuple(curves),
            words={token: self._spell(token) for token in sorted(spelled)},
        )
