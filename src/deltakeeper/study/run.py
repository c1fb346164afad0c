"""Run a study file to the end: prepare its base, write what is planned, work in one or many processes, report."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from deltakeeper.devices import working_device
from deltakeeper.errors import DataError
from deltakeeper.study.bases import describe_base, prepare_base
from deltakeeper.study.cells import AttackInfo, Judge, RunInfo
from deltakeeper.study.crew import run_crew
from deltakeeper.study.file import StudyFile
from deltakeeper.study.lens_stage import plan_looks
from deltakeeper.study.pipeline import Study, open_study, run_tracks
from deltakeeper.study.plan import StudyPlan, Track, plan_study, shortfalls
from deltakeeper.study.progress import Progress
from deltakeeper.study.store import RunStore

VERSIONED = ("deltakeeper", "torch", "transformers", "safetensors", "tokenizers", "numpy")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: why arms failed, by the arm's name, and how many of the planned cells are measured."""

    failures: dict[str, str]
    measured: int
    planned: int

    @property
    def complete(self) -> bool:
        """Whether every planned cell is measured."""
        return self.measured == self.planned and not self.failures


def run_study(
    study: StudyFile,
    out: Path,
    progress: Progress,
    *,
    command: str,
    workers: int = 1,
    ray: bool = False,
    only: str | None = None,
    discard: bool = False,
) -> Outcome:
    """Run or finish a study into a folder.

    Args:
        study: the study.
        out: run folder.
        progress: where it is shown.
        command: the command line, for the record.
        workers: processes that work side by side, each on fine-tunes of its own.
        ray: work as Ray tasks instead of processes.
        only: a group, or `group/recipe`; everything by default.
        discard: remove weights and deltas of a fine-tune once all its arms are measured.

    Raises:
        DataError: the study names what does not exist or cannot be trained.
        RunError: another process works on the folder.
        CheckpointError: the base cannot be had.
    """
    plan = plan_study(study)
    chosen = plan.only(only)
    _refuse_missing(chosen)
    store = RunStore(out)
    with store.held():
        started = time.monotonic()
        folder = prepare_base(study.base, progress)
        before = None if study.unaligned is None else prepare_base(study.unaligned, progress)
        prepared = time.monotonic() - started
        whole = open_study(plan, store, folder, study.base, before, discard)
        store.write_index(whole.entries())
        store.write_run(describe(study, whole, command))
        if prepared > 1 or not any(line.get("stage") == "prepare the base" for line in store.read_times()):
            store.note_time({"stage": "prepare the base", "seconds": prepared})
        for line in shortfalls(chosen):
            progress.say(line)
        progress.plan({track.title: len(track.variants) for track in chosen.tracks})
        work = replace(whole, plan=replace(plan, tracks=chosen.tracks))
        if workers > 1 or ray:
            run_crew(study, work, progress, workers=workers, ray=ray, only=only)
        else:
            run_tracks(work, chosen.tracks, progress)
        return _outcome(work, store)


def describe(study: StudyFile, opened: Study, command: str) -> RunInfo:
    """Where the numbers of a run come from."""
    from deltakeeper.checkpoint import open_checkpoint

    plan = opened.plan
    with open_checkpoint(opened.bases.folder) as origin:
        parameters = sum(info.numel for info in origin.tensors.values())
    model: dict[str, object] = {"name": describe_base(study.base), "parameters": parameters, "root": opened.bases.root}
    if opened.bases.unaligned_root is not None:
        model["unaligned"] = opened.bases.unaligned_root
    return RunInfo(
        command=command,
        model=model,
        versions={
            **{name: version(name) for name in VERSIONED},
            "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "study": study.sha256[:16],
        },
        seeds={name: [t.finetune.seed for t in tracks] for name, tracks in _by_attack(plan).items()},
        hardware={
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": os.cpu_count() or 1,
            "system": platform.system(),
            **_accelerator(),
        },
        judges=tuple(Judge(j.name, j.version, j.sha256) for j in (*plan.judges, plan.content) if j is not None),
        stages={},
        attacks={name: _attack_info(tracks) for name, tracks in _by_attack(plan).items()},
        primary=study.primary,
        notes=study.notes,
        study=study.name,
    )


def _by_attack(plan: StudyPlan) -> dict[str, list[Track]]:
    found: dict[str, list[Track]] = {}
    for track in plan.tracks:
        found.setdefault(track.finetune.name, []).append(track)
    return found


def _attack_info(tracks: Sequence[Track]) -> AttackInfo:
    finetune = tracks[0].finetune
    attack = finetune.attack
    settings = {k: v for k, v in asdict(attack.sft).items() if v is not None and not isinstance(v, tuple)}
    return AttackInfo(
        title=finetune.title,
        summary=attack.summary,
        settings={key: value for key, value in settings.items() if key != "seed"},
        sizes={
            "attack examples": attack.poison,
            "skill examples": attack.skill,
            "held-out prompts": attack.held_out,
        },
        recipe=finetune.recipe,
        recipe_sha256=finetune.recipe_sha256,
        source=attack.source,
        seeds=tuple(track.finetune.seed for track in tracks),
    )


def _refuse_missing(plan: StudyPlan) -> None:
    for track in plan.tracks:
        if missing := track.finetune.attack.missing():
            raise DataError(f"'{track.finetune.name}' cannot be trained: {missing[0]}")


def _outcome(study: Study, store: RunStore) -> Outcome:
    keys = {str(entry["key"]) for entry in study.entries()}
    finished = {key for key in keys if store.cell_file(key).complete}
    looks = {found.key for track in study.plan.tracks if (found := plan_looks(study, track)) and not found.done}
    return Outcome(store.read_failures((keys - finished) | looks), len(finished), len(keys))


def _accelerator() -> dict[str, str]:
    device = working_device()
    return {"accelerator": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
