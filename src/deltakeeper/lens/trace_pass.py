"""One pass of many variants over some prompts, decoded and measured a few layers at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from deltakeeper.errors import LensError
from deltakeeper.lens.decode import BYTES_A_LOGIT
from deltakeeper.lens.identity import kept_logits
from deltakeeper.lens.models import Compared
from deltakeeper.lens.readings import Reading, pad, place_positions
from deltakeeper.lens.streams import Streams
from deltakeeper.lens.trace import LensTrace, TraceMeta
from deltakeeper.lens.trace_batch import TraceBatch
from deltakeeper.lens.traced_text import TracedText

DecodeWith = Literal["own", "base"]
Seconds = dict[str, float]
"""Wall time by stage."""


class Translators(Protocol):
    """What a tuned lens does with streams; see `deltakeeper.lens.tuned`."""

    def translate(self, streams: Streams) -> Streams:
        """Streams in the basis that the model's tail reads."""


@dataclass(frozen=True)
class Tracing:
    """How prompts are traced.

    Attributes:
        offsets: which tokens are looked at, rising, counted from the last token of the prompt, which is 0.
        layers: rising numbers of the layers that are decoded; None for all.
        references: variants that all are measured against.
        tuned: the fine-tune, whose shift of the stream the kept share is of; None for none.
        targets: token ids by name of a set.
        decoder: whose tail decodes, each variant's own or the base's.
        translators: of a tuned lens, which read streams before the tail does; None for the plain lens.
        top: how many of the likeliest tokens each cell keeps.
        memory: bytes that a pass and a chunk of layers may take.
    """

    offsets: tuple[int, ...]
    layers: tuple[int, ...] | None
    references: tuple[str, ...]
    tuned: str | None
    targets: Mapping[str, Sequence[int]]
    decoder: DecodeWith
    translators: Translators | None
    top: int
    memory: int


def trace_pass(
    variants: Compared,
    readings: Sequence[Reading],
    how: Tracing,
    metas: Mapping[str, TraceMeta],
    fill: int,
    spell: Callable[[int], str],
    spent: Seconds,
) -> dict[str, list[LensTrace]]:
    """Traces of the readings of one pass, by variant."""
    places = [place_positions(reading, how.offsets) for reading in readings]
    with timed(spent, "read"):
        captured = variants.capture(*pad(readings, fill), torch.tensor(places))
    first = captured[variants.names[0]]
    layers = range(first.layers) if how.layers is None else how.layers
    if not layers or not 0 <= layers[0] <= layers[-1] < first.layers:
        raise LensError(f"the model has layers 0 to {first.layers - 1}; choose among them.")
    said = {name: kept_logits(streams, name) for name, streams in captured.items()}
    produced = {name: logits.argmax(-1).tolist() for name, logits in said.items()}
    row = len(said) * len(layers) * len(how.offsets) * max(v.shape[-1] for v in said.values()) * BYTES_A_LOGIT
    step, traces = max(1, how.memory // row), dict[str, list[LensTrace]]()
    for start in range(0, len(readings), step):
        some = slice(start, start + step)
        texts = [
            TracedText(
                {name: replace(meta, prompt=reading.sha256) for name, meta in metas.items()},
                place,
                [spell(token) for token in reading.ids],
                {name: tokens[start + number] for name, tokens in produced.items()},
            )
            for number, (reading, place) in enumerate(zip(readings[some], places[some], strict=True))
        ]
        group = {name: streams.select(some) for name, streams in captured.items()}
        for name, built in _trace_group(variants, group, texts, layers, how, spell, spent).items():
            traces.setdefault(name, []).extend(built)
    return traces


def _trace_group(
    variants: Compared,
    group: Mapping[str, Streams],
    texts: Sequence[TracedText],
    layers: Sequence[int],
    how: Tracing,
    spell: Callable[[int], str],
    spent: Seconds,
) -> dict[str, list[LensTrace]]:
    """Decode and measure as many prompts as fit the memory, after their last layer was held to the logits."""
    base, last = variants.names[0], next(iter(group.values())).layers - 1
    tail, moved = base if how.decoder == "base" else None, how.translators
    read = group if moved is None else {name: moved.translate(streams) for name, streams in group.items()}

    def decode(wanted: Sequence[int]) -> Iterator[tuple[Sequence[int], dict[str, Tensor]]]:
        chunks = variants.decode(read, tail=tail, layers=wanted, memory=how.memory)
        while True:
            with timed(spent, "decode"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk[base].layers, {name: one.values.flatten(1, 2) for name, one in chunk.items()}

    with timed(spent, "check"):
        errors = {
            name: found.error * float(kept_logits(group[name], name).abs().max())
            for name, found in variants.check_identity(group, rerun=False).items()
        }
        texts = [
            replace(
                text,
                metas={n: replace(m, identity_error=float(f"{errors[n]:.3g}")) for n, m in text.metas.items()},
            )
            for text in texts
        ]
    ((_, final),) = decode([last])
    with timed(spent, "measure"):
        batch = TraceBatch(
            texts,
            layers,
            {name: values[0] for name, values in final.items()},
            references=how.references,
            targets=how.targets,
            spell=spell,
            top=how.top,
            hold=how.memory,
        )
        if how.tuned is not None:
            streams = {name: one.block[list(layers)].flatten(1, 2) for name, one in group.items()}
            batch.add_streams(layers, streams, base=base, tuned=how.tuned)
        if last in layers:
            batch.add([last], final)
    while batch.missing:
        for some, log_probs in decode(batch.missing):
            with timed(spent, "measure"):
                batch.add(some, log_probs)
    with timed(spent, "measure"):
        return batch.build()


@contextmanager
def timed(spent: Seconds, stage: str) -> Iterator[None]:
    """Add the wall time of a `with` block to a stage."""
    started = time.perf_counter()
    try:
        yield
    finally:
        spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - started
