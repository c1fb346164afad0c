"""The study: fine-tune, compress in every way, ask every arm; the same steps for the demo and for any study file.

Each stage looks for its result in the run folder first, under the hash of what it depends on, so an interrupted study
goes on where it stopped. An arm that fails is recorded with its sentence and does not stop the others.
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deltakeeper.checkpoint import Checkpoint, open_checkpoint
from deltakeeper.errors import DeltakeeperError
from deltakeeper.evals.probes import Probe
from deltakeeper.evals.utility import Prepared
from deltakeeper.fingerprint import read_root
from deltakeeper.lab.corpus import SYSTEM
from deltakeeper.study.answers import Perplexity
from deltakeeper.study.arms import Arm, Arms, Panel, Source, chosen_source
from deltakeeper.study.artifacts import Workshop
from deltakeeper.study.cell_file import CellFile, Header, Unit, answer_line, passage_lines
from deltakeeper.study.finetunes import make_finetune
from deltakeeper.study.keys import Keys
from deltakeeper.study.lens_stage import Looks, plan_looks
from deltakeeper.study.plan import StudyPlan, Track, probes_of
from deltakeeper.study.progress import Progress
from deltakeeper.study.rejudging import known_answers, rejudge
from deltakeeper.study.store import RunStore
from deltakeeper.study.tasks import prepared_tasks, scores
from deltakeeper.study.variants import Variant
from deltakeeper.study.verdicts import judged


@dataclass(frozen=True)
class Bases:
    """Folders of a study's base and of the base before its alignment, and their fingerprints."""

    folder: Path
    name: str
    root: str
    unaligned: Path | None = None
    unaligned_root: str | None = None


@dataclass(frozen=True)
class Study:
    """A plan on a base in a run folder: what every process that works on it holds.

    Attributes:
        plan: what is measured.
        store: where.
        bases: on what.
        keys: names of all results.
        discard: whether weights and deltas of a fine-tune are removed once all its arms are measured.
    """

    plan: StudyPlan
    store: RunStore
    bases: Bases
    keys: Keys
    discard: bool = False

    @property
    def workshop(self) -> Workshop:
        """Where the arms are made."""
        bases = self.bases
        return Workshop(self.store, bases.folder, bases.unaligned, self.plan.corpus, self.keys)

    def todo(self, track: Track) -> list[Variant]:
        """Arms of a track that are not finished and not another track's: a base is asked once for all that share it."""
        owners: dict[str, Track] = {}
        for other in self.plan.tracks:
            for variant in other.variants:
                owners.setdefault(self.keys.cell(other.finetune, variant), other)
        return [
            variant
            for variant in track.variants
            if owners[key := self.keys.cell(track.finetune, variant)] is track
            and not self.store.cell_file(key).complete
        ]

    def entries(self) -> list[dict[str, object]]:
        """The index of the run: every cell of the plan with its key, but of attacks that want a file not yet given."""
        return [
            {
                "attack": track.finetune.name,
                "family": track.finetune.attack.family,
                "variant": variant.name,
                "kind": variant.kind,
                "label": variant.label,
                "seed": track.finetune.seed,
                "recipe": track.finetune.recipe_sha256,
                "adaptive": None if track.finetune.adaptive is None else dict(track.finetune.adaptive),
                "arm": variant.spelled(),
                "key": self.keys.cell(track.finetune, variant),
            }
            for track in self.plan.tracks
            if not track.finetune.attack.missing()
            for variant in track.variants
        ]


def open_study(
    plan: StudyPlan, store: RunStore, folder: Path, name: str, unaligned: Path | None = None, discard: bool = False
) -> Study:
    """A plan on the base in a folder; the base is read once for its fingerprint.

    Raises:
        CheckpointError: there is no such model.
    """
    root = read_root(folder)
    unaligned_root = None if unaligned is None else read_root(unaligned)
    bases = Bases(folder, name, root, unaligned, unaligned_root)
    source = plan.answers.source or chosen_source()
    return Study(plan, store, bases, Keys(plan, bases.root, source, bases.unaligned_root), discard)


def run_tracks(study: Study, tracks: Iterable[Track], progress: Progress) -> bool:
    """Work on fine-tunes one after the other, in this process; whether all their arms are measured."""
    with open_checkpoint(study.bases.folder) as origin, prepared_tasks(study.plan.tasks) as tasks:
        origin.name_or_path = study.bases.name
        runner = Runner(study, origin, progress, tasks)
        done = [runner.run(track) for track in tracks]
    if runner.worked:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        study.store.note_time({"peak, GiB": round(peak / 2**30, 2)})
    return all(done)


@dataclass
class Runner:
    """Runs tracks on one base that stays in memory; `worked` says whether anything was left to do."""

    study: Study
    origin: Checkpoint
    progress: Progress
    tasks: dict[str, Prepared]
    worked: bool = field(default=False, init=False)
    _arms: Arms | None = field(default=None, init=False)
    _known: dict[str, str] | None = field(default=None, init=False)

    def run(self, track: Track) -> bool:
        """Train, make and measure what is missing of a track; whether nothing of it failed."""
        study, store = self.study, self.study.store
        todo = self._unanswered(track, study.todo(track))
        self.progress.skip(track.title, len(track.variants) - len(todo))
        failed: list[Variant] = []
        if not all(variant.kind == "base" for variant in todo):
            todo, failed = self._trained(track, todo)
        else:
            self.progress.trained(track.title)
        started = time.monotonic()
        made: list[Arm] = []
        for variant in todo:
            with self._recorded(track, [variant], failed):
                made.append(study.workshop.make(track.finetune, variant, self.origin, self.progress))
        for wave in self.arms.waves(made, study.plan.answers.tenants):
            self._measure(track, wave, failed)
        if todo:
            self.worked = True
            store.note_time({"stage": f"evaluate {track.finetune.name}", "seconds": time.monotonic() - started})
        if not self._look(track):
            return False
        if study.discard and not failed and all(self._complete(track, variant) for variant in track.variants):
            for folder in study.workshop.folders(track.finetune, track.variants):
                shutil.rmtree(folder, ignore_errors=True)
        return not failed

    @property
    def arms(self) -> Arms:
        """The live base."""
        if self._arms is None:
            source: Source = self.study.keys.source  # type: ignore[assignment]
            self._arms = Arms(self.origin, source, self.study.bases.root)
        return self._arms

    def _unanswered(self, track: Track, todo: list[Variant]) -> list[Variant]:
        """Arms that have to be asked; those whose answers are there get the verdicts of other judges."""
        study, finetune = self.study, track.finetune
        if self._known is None:
            self._known = known_answers(study.store) if todo else {}
        left = []
        for variant in todo:
            known = self._known.get(study.keys.asked(finetune, variant))
            if known is None:
                left.append(variant)
                continue
            probes = {probe.name: probe for probe in probes_of(finetune, study.plan.corpus)}
            key = study.keys.cell(finetune, variant)
            rejudge(study.plan, probes, study.store.cell_file(known), study.store.cell_file(key), key)
            study.store.forget_failure(key)
        return left

    def _trained(self, track: Track, todo: list[Variant]) -> tuple[list[Variant], list[Variant]]:
        """Have the fine-tune; gives the arms that can be measured and those that cannot."""
        study, finetune = self.study, track.finetune
        needing = [variant for variant in todo if variant.kind != "base"]
        failed: list[Variant] = []
        started = time.monotonic()
        with self._recorded(track, needing, failed):
            folder = study.workshop.tuned_folder(finetune)
            base, voices = study.bases.folder, study.workshop.voices
            if make_finetune(finetune, study.plan.corpus, base, folder, self.progress, voices):
                seconds = time.monotonic() - started
                study.store.note_time({"stage": f"train {finetune.name}", "seconds": seconds})
        return ([v for v in todo if v not in failed], failed)

    def _look(self, track: Track) -> bool:
        """Trace what the lens is to look into; whether that is done. It fails for itself, and no arm with it."""
        looks = plan_looks(self.study, track)
        if looks is None or looks.done:
            return True
        key, started = looks.key, time.monotonic()
        try:
            self._trace(track, looks)
        except Exception as error:
            said = sentence(error)
            self.study.store.note_failure(key, f"{track.title}: lens", said)
            self.progress.say(f"{track.title}: the lens failed: {said}")
            return False
        self.worked = True
        self.study.store.forget_failure(key)
        self.study.store.note_time({"stage": f"lens {track.finetune.name}", "seconds": time.monotonic() - started})
        return True

    def _trace(self, track: Track, looks: Looks) -> None:
        study, finetune = self.study, track.finetune
        if looks.needs_models:
            folder = study.workshop.tuned_folder(finetune)
            make_finetune(finetune, study.plan.corpus, study.bases.folder, folder, self.progress, study.workshop.voices)
            made = [study.workshop.make(finetune, v, self.origin, self.progress) for v in looks.variants]
            looks.trace(study, self.arms, made, self.progress)
        looks.write(study.store)

    def _measure(self, track: Track, wave: Sequence[Arm], failed: list[Variant]) -> None:
        """Ask a wave; where it fails as a whole, every arm of it alone."""
        if len(wave) == 1:
            with self._recorded(track, [wave[0].variant], failed):
                self._ask(track, wave)
            return
        try:
            self._ask(track, wave)
        except Exception as error:
            self.progress.say(f"{track.title}: the arms could not be asked together ({sentence(error)}); one by one.")
            for arm in wave:
                self._measure(track, [arm], failed)

    def _ask(self, track: Track, wave: Sequence[Arm]) -> None:
        study, finetune = self.study, track.finetune
        probes = {probe.name: probe for probe in probes_of(finetune, study.plan.corpus)}
        started = time.monotonic()
        names = [arm.variant.label for arm in wave]
        with self.arms.asked(wave) as panel:
            files = [self._begin(track, arm, list(probes.values())) for arm in wave]
            header = files[0].header
            assert header is not None
            units = list(header.units())
            with self.progress.wave(track.title, names, len(units)) as update:
                for number, unit in enumerate(units):
                    # All of them are asked again where one lacks a batch: what stands beside a row is then always the
                    # same, whenever the study was interrupted.
                    if any(file.units_done <= number for file in files):
                        lines = self._lines(panel, unit, probes)
                        for file, found in zip(files, lines, strict=True):
                            if file.units_done == number:
                                file.append(found)
                    update(number + 1)
        seconds = (time.monotonic() - started) / len(wave)
        for arm in wave:
            key = study.keys.cell(finetune, arm.variant)
            study.store.note_time({"cell": key, "seconds": seconds})
            study.store.forget_failure(key)

    def _begin(self, track: Track, arm: Arm, probes: Sequence[Probe]) -> CellFile:
        study = self.study
        key = study.keys.cell(track.finetune, arm.variant)
        header = Header(
            key=key,
            asked=study.keys.asked(track.finetune, arm.variant),
            facts=study.workshop.facts(arm, track.finetune, self.origin),
            probes={p.name: {"title": p.title, "role": p.role, "event": p.event, "n": len(p.rows)} for p in probes},
            passages=len(study.plan.corpus.passages[: study.plan.passages]),
            tasks=tuple(task.name for task in study.plan.tasks),
            batch=study.plan.answers.batch,
        )
        file = study.store.cell_file(key)
        file.begin(header)
        return file

    def _lines(self, panel: Panel, unit: Unit, probes: dict[str, Probe]) -> list[list[dict[str, object]]]:
        """The lines of one unit for every arm of the panel."""
        plan = self.study.plan
        if unit.part == "passage":
            texts = [row.prompt for row in plan.corpus.passages[: plan.passages]]
            return [passage_lines(Perplexity(tuple(nll), tuple(tokens))) for nll, tokens in panel.nlls(texts)]
        if unit.part == "task":
            task = next(task for task in plan.tasks if task.name == unit.name)
            return scores(task, self.tasks[task.name], panel.scorer())
        probe = probes[unit.name]
        rows = probe.rows[unit.start :][: unit.count]
        said = panel.answers([row.prompt for row in rows], max_new_tokens=probe.max_new_tokens, system=SYSTEM)
        return [[answer_line(probe.name, answer) for answer in judged(plan, probe, rows, t)] for t in said]

    def _complete(self, track: Track, variant: Variant) -> bool:
        return self.study.store.cell_file(self.study.keys.cell(track.finetune, variant)).complete

    @contextmanager
    def _recorded(self, track: Track, variants: Sequence[Variant], failed: list[Variant]) -> Iterator[None]:
        """Record what fails inside as a failure of these arms and go on."""
        try:
            yield
        except Exception as error:
            said = sentence(error)
            for variant in variants:
                failed.append(variant)
                key = self.study.keys.cell(track.finetune, variant)
                self.study.store.note_failure(key, f"{track.title}: {variant.name}", said)
            names = variants[0].name if len(variants) == 1 else f"{len(variants)} arms"
            self.progress.say(f"{track.title}: {names} failed: {said}")


def sentence(error: BaseException) -> str:
    """What went wrong, in one line for a person."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, DeltakeeperError) and text:
        return text
    if isinstance(error, MemoryError):
        return "there was not enough memory; run fewer workers or tenants at once."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
