"""The study: fine-tune each attack, compress its delta in every way, evaluate every arm, cell by committed cell.

Each stage looks for its result in the run folder first, so an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltakeeper.apply import merge_survival
from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import Checkpoint, open_checkpoint
from deltakeeper.compress import CompressionReport, compress
from deltakeeper.evals.judges import KeywordJudge
from deltakeeper.lab.attacks import Attack
from deltakeeper.lab.corpus import Corpus
from deltakeeper.study.arms import Arms
from deltakeeper.study.cells import Cell, Fidelity
from deltakeeper.study.finetunes import train_attack
from deltakeeper.study.progress import Progress
from deltakeeper.study.store import RunStore
from deltakeeper.study.variants import Variant


@dataclass(frozen=True)
class StudyPlan:
    """What a study measures: attacks times variants, on one corpus, judged by one judge."""

    attacks: tuple[Attack, ...]
    variants: tuple[Variant, ...]
    corpus: Corpus
    judge: KeywordJudge


def run_study(plan: StudyPlan, store: RunStore, base: Path, progress: Progress) -> dict[str, float]:
    """Run or finish a study on the aligned base in folder `base`.

    Returns:
        Wall seconds of each stage that did any work in this call.

    Raises:
        RunError: a stored training state belongs to other data or settings.
    """
    seconds: dict[str, float] = {}
    progress.plan({a.name: [v.name for v in plan.variants] for a in plan.attacks})
    for attack in plan.attacks:
        todo = [v for v in plan.variants if not store.has_cell(attack.name, v.name)]
        started = time.monotonic()
        if train_attack(attack, plan.corpus, base, store.model_dir(attack.name), progress):
            seconds[f"train {attack.name}"] = time.monotonic() - started
        progress.skip(attack.name, len(plan.variants) - len(todo))
    with open_checkpoint(base) as origin:
        arms = Arms(origin, plan.corpus, plan.judge)
        for attack in plan.attacks:
            started = time.monotonic()
            worked = False
            for variant in plan.variants:
                if store.has_cell(attack.name, variant.name):
                    continue
                worked = True
                with progress.cell(attack.name, variant.label):
                    store.write_cell(measure(attack, variant, store, origin, arms))
            if worked:
                seconds[f"evaluate {attack.name}"] = time.monotonic() - started
    return seconds


def measure(attack: Attack, variant: Variant, store: RunStore, origin: Checkpoint, arms: Arms) -> Cell:
    """Compress (if the variant does), evaluate, and give the finished cell."""
    started = time.monotonic()
    with open_checkpoint(store.model_dir(attack.name)) as tuned:
        full = sum(t.nbytes for t in tuned.tensors.values())
        report, survival, nbytes = None, None, None
        delta = None
        if variant.codec is not None:
            folder = store.delta_dir(attack.name, variant.codec)
            report = _compress_once(origin, tuned, folder, variant.codec)
            delta = open_artifact(folder)
            nbytes = delta.nbytes
            if variant.kind == "merged":
                survival = merge_survival(origin, delta)
        answers = arms.evaluate(variant, attack.probes(arms.corpus), tuned, delta)
        if variant.kind in ("tuned", "merged"):
            nbytes = full  # a merged checkpoint is stored whole
        elif variant.kind == "quantised":
            nbytes = arms.quantised_bytes
        weights = sum(t.numel for t in tuned.tensors.values())
    return Cell(
        attack=attack.name,
        family=attack.family,
        variant=variant.name,
        kind=variant.kind,
        label=variant.label,
        bytes=nbytes,
        full_bytes=full,
        bits_per_weight=None if nbytes is None else 8 * nbytes / weights,
        fidelity=None if report is None else _fidelity(report),
        merge_survival=survival,
        probes=answers.probes,
        perplexity=answers.perplexity,
        seconds=time.monotonic() - started,
    )


def _compress_once(origin: Checkpoint, tuned: Checkpoint, folder: Path, codec: str) -> CompressionReport:
    if folder.is_dir():
        return CompressionReport.load(folder)
    return compress(origin, tuned, folder, codec)


def _fidelity(report: CompressionReport) -> Fidelity:
    total = report.total
    return Fidelity(total.relative_error, total.cosine, total.norm_ratio, total.sign_agreement)


def stages_text(seconds: Sequence[tuple[str, float]]) -> str:
    """Wall seconds of stages as one line."""
    return ", ".join(f"{name} {value:.0f} s" for name, value in seconds)
