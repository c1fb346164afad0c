"""Guarded healing: the continuous values of a compressed delta fitted to two teachers.

The fine-tune says how benign exchanges are answered that the tenant declared, the aligned base how everything else is:
an operator's safety probes, their harmless twins and plain instructions. `KL(teacher ‖ student)` on the tokens of the
answers, everything but the values frozen.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deltakeeper.artifact import DeltaArtifact, open_artifact
from deltakeeper.artifact_writer import ArtifactWriter
from deltakeeper.calibration.inputs import load_decoder
from deltakeeper.checkpoint import Checkpoint, opened
from deltakeeper.devices import working_device
from deltakeeper.errors import DeltakeeperError
from deltakeeper.heal.guard_fit import GuardFit
from deltakeeper.heal.guard_settings import GuardSettings
from deltakeeper.heal.guard_terms import GuardedTerms
from deltakeeper.heal.hearing import Heard, hear
from deltakeeper.heal.lessons import Lesson, check_lessons, common_beginning
from deltakeeper.heal.run import check_models
from deltakeeper.heal.student import build_student, check_forms, checksums
from deltakeeper.heal.teacher import Progress
from deltakeeper.heal.write import write_healed
from deltakeeper.model_folder import student_folder, tuned_folder


@dataclass(frozen=True)
class GuardReport:
    """What guarding did.

    Attributes:
        before: mean divergence from the teachers over the first tenth of the steps, nats per token, by kind of lesson.
        after: the same over the last tenth. Both are of lessons in training; measure refusals and skill on others.
        trained: number of values that could change.
        steps: steps taken.
        lessons: number of lessons by kind.
        tokens: tokens that the student read.
        seconds: wall time.
        training_seconds: of that, the steps alone.
    """

    before: dict[str, float]
    after: dict[str, float]
    trained: int
    steps: int
    lessons: dict[str, int]
    tokens: int
    seconds: float
    training_seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)


def guard(
    delta: DeltaArtifact | str | Path,
    base: Checkpoint | str | Path,
    tuned: Checkpoint | str | Path,
    lessons: Sequence[Lesson],
    out: str | Path,
    *,
    settings: GuardSettings | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> GuardReport:
    """Fit a compressed delta to what two teachers say, and write it as a new artifact.

    One model is in memory at a time; the student takes that of the base and a byte a weight for sign planes.

    Args:
        delta: the artifact.
        base: the base that it was made from, aligned.
        tuned: the fine-tune that it stands for.
        lessons: what is learned, each from its teacher.
        out: artifact folder to write; nothing is left there if anything fails.
        settings: see `GuardSettings`.
        overwrite: replace an artifact that is there.
        progress: called with (done, in all, what is done).

    Raises:
        BaseMismatchError: this is not the base that the delta was made from.
        CheckpointError: a model cannot be loaded or run, or this is not the fine-tune that the delta was made from.
        DataError: a lesson cannot be learned.
        ArtifactError: `out` may not be replaced or cannot be written.
        DeltakeeperError: the artifact has nothing to train, a form that cannot be healed, or the loss left every range.
    """
    settings = settings or GuardSettings()
    check_lessons(lessons)
    started = time.monotonic()
    artifact = delta if isinstance(delta, DeltaArtifact) else open_artifact(delta)
    check_forms(artifact)
    with ExitStack() as stack:
        origin = stack.enter_context(opened(base))
        target = stack.enter_context(opened(tuned, base=origin))
        writer = stack.enter_context(ArtifactWriter(Path(out), overwrite, (artifact.path, origin.path, target.path)))
        check_models(artifact, origin, target)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deltakeeper-guard-")))
        shared = common_beginning(lessons)
        folders = {"base": origin.path, "tuned": tuned_folder(target, origin, scratch)}
        heard: dict[str, Heard] = {
            teacher: hear(folders[teacher], lessons, teacher, shared, progress=progress)
            for teacher in sorted({lesson.teacher for lesson in lessons})
        }
        model: Any = load_decoder(student_folder(origin, artifact, scratch)).to(working_device())
        made = GuardedTerms(artifact, settings)
        student = build_student(model, artifact, "scales", made.prepare)
        groups = made.groups()
        if not groups:
            raise DeltakeeperError(f"{artifact.path} has no values to train, and no low-rank term is asked for.")
        frozen = checksums(model)
        fit = GuardFit(model, lessons, heard, shared, settings)
        began = time.monotonic()
        fit.train(groups, progress)
        training = time.monotonic() - began
        if checksums(model) != frozen:
            raise DeltakeeperError("a frozen weight was written to while guarding; report this as a bug.")
        with torch.no_grad():
            terms = {name: found.packed() for name, found in student.trained.items()}
        kinds = {kind: sum(lesson.group == kind for lesson in lessons) for kind in fit.history[0] | fit.history[-1]}
        tenth = max(1, fit.steps // 10)
        report = GuardReport(
            before=_mean(fit.history[:tenth]),
            after=_mean(fit.history[-tenth:]),
            trained=sum(step.numel() for step in student.parameters()),
            steps=fit.steps,
            lessons=dict(sorted(kinds.items())),
            tokens=fit.tokens,
            seconds=time.monotonic() - started,
            training_seconds=training,
        )
        del model, student, fit, heard, groups, made
        gc.collect()
        how = {"guard": settings.to_json(), **report.to_json()}
        write_healed(writer, artifact, origin, target, terms, how)
    return report


def _mean(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    kinds = sorted({kind for step in steps for kind in step})
    return {kind: sum(s[kind] for s in steps if kind in s) / sum(kind in s for s in steps) for kind in kinds}
