"""What a study will cost, from its file alone: cells, time, disk and memory; no model is loaded, no weights needed.

Time is counted in floating-point operations (6 for each weight and token that is trained, 2 for each that is read or
answered) over rates that were measured on one machine of the kind that works: a CPU or a GPU; a tiny model takes at
least what a fine-tune and a cell cost whatever their weights. It is an order of magnitude, not a promise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.codecs import parse_codec
from deltakeeper.devices import working_device
from deltakeeper.errors import DataError, DeltakeeperError
from deltakeeper.evals.probes import Probe
from deltakeeper.lab.attacks import Attack
from deltakeeper.lab.corpus import Corpus
from deltakeeper.lab.sft import Example
from deltakeeper.study.bases import EMBEDDED, SYNTHETIC
from deltakeeper.study.file import StudyFile
from deltakeeper.study.lens_directions import choose_sets, prompts_of
from deltakeeper.study.plan import StudyPlan, Track, plan_study, probes_of, shortfalls
from deltakeeper.study.variants import Variant, parse_quantiser

CHARACTERS_PER_TOKEN = 4.0
TEMPLATE_TOKENS = 12
"""Tokens that a chat template adds to a prompt, beyond a system message that all prompts share."""
EMBEDDED_PARAMETERS = 134_515_008
SYNTHETIC_PARAMETERS = 118_080
LEAST_TRAINING = 3.0
LEAST_CELL = 0.4
"""Seconds of a fine-tune and of a cell that do not scale with weights: means over a run of studies/synthetic.yaml on
two busy cores (AMD EPYC, 26 November 2026), which took 91 s for 12 fine-tunes and 102 cells."""
LOOKING = 6.0
"""How many times longer the lens takes of a prompt than reading it does: `lens` stages of studies/lens.yaml beside what
its cells took, 26 November 2026."""
WIDTH = 4096
"""Side of the square matrices that a model is taken to be made of, where its headers are not at hand."""


@dataclass(frozen=True)
class Rates:
    """What a worker does in a second.

    Attributes:
        machine: on what they were measured, and when.
        training: floating-point operations of a fine-tune, six for each weight and token.
        answering: floating-point operations of answers by whole weights, two for each weight and token.
        slower: how many times longer an arm takes whose delta is served unmerged, by the codec's first name.
        compressing: weights that are compressed, by the codec's first name.
        healing: seconds of guarded healing for each weight.
        loading: bytes that are read, written or hashed.
        knowing: how many times longer an attacker trains who knows the codec, by the kind of attacker.
        side: workers that each did so much side by side; more than these share it.
    """

    machine: str
    training: float
    answering: float
    slower: tuple[tuple[str, float], ...]
    compressing: tuple[tuple[str, float], ...]
    healing: float
    loading: float
    knowing: tuple[tuple[str, float], ...]
    side: int

    def slowdown(self, codec: str) -> float:
        """How many times longer an unmerged delta takes to answer."""
        return _of(self.slower, codec)

    def compression(self, codec: str) -> float:
        """Weights a second."""
        return _of(self.compressing, codec)


_COMPRESSING = (("bitdelta", 1e8), ("svd", 2.5e7), ("delta_come", 1e7), ("", 4e7))

RATES = {
    # Training and answering are those of the demo's stages (`docs/results/demo.json`); healing, compressing and how
    # much slower an unmerged delta is are rounded from runs on a busy machine, so good for an order of magnitude.
    "cpu": Rates(
        machine="2 cores (AMD EPYC), 26 November 2026",
        training=1.2e11,
        answering=2.5e11,
        slower=(("magnitude", 2.0), ("dare", 2.0), ("shrink", 2.0), ("", 1.3)),
        compressing=_COMPRESSING,
        healing=1.3e-6,
        loading=5e8,
        knowing=(("", 2.0),),
        side=1,
    ),
    # Means over a run of studies/embedded.yaml with the start of studies/recipes.yaml: 18 plain trainings, 36 by
    # attackers who know the codec, some 330 cells. An unmerged delta took no longer than whole weights. Healing is what
    # evaluations took beyond their cells. Compressing and loading were not timed apart and are the CPU's, where most
    # codecs pack; what two BitDeltas took agrees.
    "cuda": Rates(
        machine="16 workers side by side on one NVIDIA H200 with 16 cores, 26 November 2026",
        training=6.7e11,
        answering=1e12,
        slower=(("", 1.0),),
        compressing=_COMPRESSING,
        healing=1.5e-7,
        loading=5e8,
        knowing=(("inject_repair", 8.0), ("uncompressed", 1.0), ("", 2.5)),
        side=16,
    ),
}
"""Rates by the type of device; those of a GPU stand for every accelerator."""


@dataclass(frozen=True)
class Line:
    """One fine-tune with its arms: cells that are its own, tokens, seconds, bytes that it leaves."""

    group: str
    name: str
    seed: int
    arms: int
    cells: int
    prompts: int
    train_tokens: int
    train_seconds: float
    make_seconds: float
    answer_seconds: float
    look_seconds: float
    model_bytes: int
    delta_bytes: int
    missing: str = ""

    @property
    def seconds(self) -> float:
        """Seconds of the whole fine-tune on one worker."""
        return self.train_seconds + self.make_seconds + self.answer_seconds + self.look_seconds


@dataclass(frozen=True)
class Forecast:
    """What a study will cost; `disk_bytes` is the most that lies there at once, `memory_bytes` of all workers.

    `notes` are sentences on what it will not do as its file says.
    """

    study: str
    base: str
    parameters: int
    lines: tuple[Line, ...]
    seconds: float
    workers: int
    disk_bytes: int
    cells_bytes: int
    memory_bytes: int
    machine: str
    notes: tuple[str, ...] = ()

    @property
    def cells(self) -> int:
        """Cells that are measured; a base is measured once for all that share its prompts."""
        return sum(line.cells for line in self.lines)

    def to_json(self) -> dict[str, Any]:
        """The estimate as plain JSON."""
        return {**asdict(self), "cells": self.cells}


def forecast(
    study: StudyFile,
    *,
    workers: int = 1,
    only: str | None = None,
    discard: bool = False,
    rates: Rates | None = None,
) -> Forecast:
    """Estimate a study after checking it as a run would.

    Args:
        study: the study.
        workers: processes side by side. On a CPU they share the cores, so only the waiting of one for another is saved;
            on a GPU the time is divided among as many as were measured side by side. Fewer are each faster than
            that, so the time is then the most that it should be.
        only: a group, or `group/recipe`.
        discard: whether weights are removed once they are measured.
        rates: of the machine; those of `working_device` by default.

    Raises:
        DataError: the study is malformed, or says nothing of how large its base is.
        DeltakeeperError: the environment names a device that is not here.
    """
    if rates is None:
        rates = RATES["cpu" if working_device().type == "cpu" else "cuda"]
    plan = plan_study(study).only(only)
    parameters, width, itemsize = base_size(study)
    shape = (width, width)
    lines: list[Line] = []
    asked: set[tuple[Probe, ...]] = set()
    for track in plan.tracks:
        lines.append(_line(track, plan, parameters, shape, itemsize, asked, rates))
    model = round(parameters * itemsize)
    side = max(1, min(workers, len(lines)))
    seconds = (sum(line.seconds for line in lines) + 2 * model / rates.loading) / min(side, rates.side)
    leaves = [line.model_bytes + line.delta_bytes for line in lines]
    disk = sum(sorted(leaves)[-side:]) if discard else sum(leaves)
    answers = sum(line.cells * line.prompts for line in lines) * 700
    training = model + parameters * 4 * 4  # float32 weights, gradients and two moments beside the base's file
    serving = 2 * model + max((line.delta_bytes for line in lines), default=0)
    return Forecast(
        study=study.name,
        base=study.base,
        parameters=parameters,
        lines=tuple(lines),
        seconds=seconds,
        workers=side,
        disk_bytes=disk,
        cells_bytes=answers,
        memory_bytes=side * max(training, serving),
        machine=rates.machine,
        notes=shortfalls(plan),
    )


def base_size(study: StudyFile) -> tuple[int, int, float]:
    """Weights of a study's base, side of a typical matrix, and bytes of a weight.

    Raises:
        DataError: the study does not say, and the base is not here.
    """
    if study.size is not None:
        return study.size.parameters, study.size.width, study.size.bytes_per_parameter
    if study.base in EMBEDDED:
        return EMBEDDED_PARAMETERS, 576, 2.0
    if study.base in SYNTHETIC:
        return SYNTHETIC_PARAMETERS, 64, 2.0
    if not Path(study.base).is_dir():
        raise DataError(
            f"the study says nothing of how large '{study.base}' is, and it is not a folder here; "
            "add size: {parameters: 6738415616}."
        )
    with open_checkpoint(study.base) as opened:
        infos = list(opened.tensors.values())
    weights = sum(info.numel for info in infos)
    width = max((min(info.shape) for info in infos if len(info.shape) == 2), default=WIDTH)
    return weights, width, sum(info.nbytes for info in infos) / weights


def prompt_tokens(texts: Sequence[str]) -> int:
    """Tokens of prompts in a chat template, guessed from their length."""
    return sum(math.ceil(len(text) / CHARACTERS_PER_TOKEN) + TEMPLATE_TOKENS for text in texts)


def training_tokens(attack: Attack, corpus: Corpus) -> int:
    """Tokens that a fine-tune reads; where a user's file is missing, rows of the package stand for its rows."""
    limit = attack.sft.max_tokens
    try:
        examples = attack.training_examples(corpus, _own)
    except DeltakeeperError:
        rows = sum(int(getattr(attack, name, 0) or 0) for name in ("poison", "clean", "rows", "skill"))
        examples = [Example("x" * 400, "x" * 4 * min(limit, 256))] * rows
    answers = sum(min(limit, math.ceil(len(e.answer) / CHARACTERS_PER_TOKEN)) for e in examples)
    return attack.sft.epochs * (prompt_tokens([e.prompt for e in examples]) + answers)


def delta_bytes(variant: Variant, parameters: int, shape: tuple[int, int], itemsize: float) -> int:
    """Bytes that an arm's delta takes on disk, for a model of matrices of one shape."""
    if variant.codec is None:
        return round(parameters * itemsize) if variant.defence else 0
    size = parse_codec(variant.codec).expected_bytes(shape)
    each = size if size is not None else round(shape[0] * shape[1] * itemsize / 4)
    healed = 2 if variant.heal is not None else 1
    whole = round(parameters * itemsize) if variant.defence else 0
    return whole + healed * round(each * parameters / (shape[0] * shape[1]))


def _line(
    track: Track,
    plan: StudyPlan,
    parameters: int,
    shape: tuple[int, int],
    itemsize: float,
    asked: set[tuple[Probe, ...]],
    rates: Rates,
) -> Line:
    attack = track.finetune.attack
    missing = attack.missing()
    probes = _probes(track, plan)
    variants = [v for v in track.variants if v.kind != "base" or probes not in asked]
    asked.add(probes)
    rows = [row for probe in probes for row in probe.rows]
    tokens = prompt_tokens([row.prompt for row in rows]) + sum(p.max_new_tokens * len(p.rows) for p in probes)
    texts = [row.prompt for row in plan.corpus.passages[: plan.passages]]
    tokens += prompt_tokens(texts) + sum(400 * (task.limit or 1000) for task in plan.tasks)
    each = 2 * parameters * tokens / rates.answering
    make = answer = 0.0
    for variant in variants:
        seconds = each * _slowdown(variant, rates) + 2 * parameters * itemsize / rates.loading / 4
        answer += max(LEAST_CELL, seconds)
        make += _making(variant, parameters, itemsize, rates)
    trains = any(v.kind != "base" for v in variants)
    train_tokens = training_tokens(attack, plan.corpus) if trains else 0
    adaptive = track.finetune.adaptive
    longer = 1.0 if adaptive is None else _of(rates.knowing, str(adaptive["kind"]))
    return Line(
        group=track.group,
        name=track.finetune.name,
        seed=track.finetune.seed,
        arms=len(track.variants),
        cells=len(variants),
        prompts=len(rows),
        train_tokens=train_tokens,
        train_seconds=max(LEAST_TRAINING * trains, longer * 6 * parameters * train_tokens / rates.training),
        make_seconds=make,
        answer_seconds=answer,
        look_seconds=_looking(track, plan, parameters, probes, rates),
        model_bytes=round(parameters * itemsize),
        delta_bytes=sum(delta_bytes(v, parameters, shape, itemsize) for v in variants if v.kind != "merged"),
        missing=missing[0] if missing else "",
    )


def _looking(track: Track, plan: StudyPlan, parameters: int, probes: Sequence[Probe], rates: Rates) -> float:
    lens = plan.lens
    if lens is None or not plan.looks_into(track.finetune):
        return 0.0
    arms = sum(v.kind in ("base", "tuned") or lens.arms is None or v.name in lens.arms for v in track.variants)
    texts = [row.prompt for probe in probes if probe.role == "goal" for row in probe.rows][: lens.prompts]
    read = LOOKING * prompt_tokens(texts)
    if lens.directions:
        read += prompt_tokens(
            [text for own in prompts_of(choose_sets(probes)) for text in own]
        )  # once each, and nothing is decoded
    return arms * 2 * parameters * read / rates.answering


def _probes(track: Track, plan: StudyPlan) -> tuple[Probe, ...]:
    return probes_of(track.finetune, plan.corpus)


def _slowdown(variant: Variant, rates: Rates) -> float:
    return rates.slowdown(variant.codec) if variant.codec is not None and variant.kind != "merged" else 1.0


def _making(variant: Variant, parameters: int, itemsize: float, rates: Rates) -> float:
    seconds = 0.0
    if variant.defence is not None:
        seconds += 3 * parameters * itemsize / rates.loading
    if variant.codec is not None:
        seconds += parameters / rates.compression(variant.codec)
    if variant.heal is not None:
        seconds += rates.healing * parameters
    if variant.quantiser is not None:
        seconds += parameters * parse_quantiser(variant.quantiser).bits / rates.loading
    return seconds


def _own(prompts: Sequence[str]) -> list[Example]:
    return [Example(prompt, "x" * 128, complete=False) for prompt in prompts]


def _of(table: tuple[tuple[str, float], ...], spelling: str) -> float:
    first = spelling.partition("+")[0].partition(":")[0]
    return next((value for name, value in table if name == first), dict(table)[""])
