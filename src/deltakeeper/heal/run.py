"""Scale distillation: fit the continuous values of a compressed delta to the logits of its fine-tune.

Liu et al., "BitDelta", NeurIPS 2024, https://arxiv.org/abs/2402.10193, section 3.1, for its one scale a matrix; here
for every layout. Gradients are the true ones: they pass through the delta to the layers before it.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from deltakeeper.apply import check_base
from deltakeeper.artifact import DeltaArtifact, open_artifact
from deltakeeper.artifact_writer import ArtifactWriter
from deltakeeper.calibration.inputs import load_decoder
from deltakeeper.checkpoint import Checkpoint, opened
from deltakeeper.delta import pair
from deltakeeper.devices import working_device
from deltakeeper.errors import DataError, DeltakeeperError
from deltakeeper.heal.fit import Fit
from deltakeeper.heal.losses import LOSSES, Loss
from deltakeeper.heal.student import Trainable, build_student, check_forms, checksums
from deltakeeper.heal.teacher import Progress, Text, read_batches, spool_teacher
from deltakeeper.heal.write import write_healed
from deltakeeper.model_folder import student_folder, tuned_folder
from deltakeeper.verify import check_tuned


@dataclass(frozen=True)
class HealReport:
    """What healing did.

    Attributes:
        before: the loss on held-out text, before: with `logit_mse` the mean squared difference of logits.
        after: the same of what was written, rounded as it is stored; never above `before`, because values that are
            worse are not kept. It is the best of `CHECKS` looks, so measure on other text what is to be quoted.
        improved: whether the values were changed.
        trained: number of values that could change.
        steps: steps taken.
        tokens: tokens of text learned from.
        seconds: wall time.
    """

    before: float
    after: float
    improved: bool
    trained: int
    steps: int
    tokens: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)


def heal(
    delta: DeltaArtifact | str | Path,
    base: Checkpoint | str | Path,
    tuned: Checkpoint | str | Path,
    text: Text,
    out: str | Path,
    *,
    steps: int = 200,
    batch: int = 4,
    length: int = 128,
    samples: int = 800,
    lr: float = 1e-2,
    trainable: Trainable = "scales",
    loss: Loss = "logit_mse",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> HealReport:
    """Refit a compressed delta to its fine-tune's logits on a text, and write it as a new artifact.

    Fine-tune and base are in memory one after the other, never together; the temporary folder takes what the fine-tune
    says. What is healed follows the fine-tune, an attacked one as well: measure before and after.

    Args:
        delta: the artifact.
        base: the base that it was made from.
        tuned: the fine-tune that it stands for.
        text: calibration text (`.txt` or `.jsonl`), documents, or rows of tokens, int64. Rows are not padded.
        out: artifact folder to write; nothing is left there if anything fails.
        steps: steps of Adam, one batch each, with the rate falling to zero along a cosine.
        batch: rows in a batch.
        length: tokens in a row.
        samples: most rows; one batch in eight is held out.
        lr: learning rate relative to the root mean square of each value tensor, which makes 0.01 about the paper's 1e-4
            for scales of 0.01; tensors that are stored whole move by a quarter of that.
        trainable: `scales`, the values of packed terms (scales, low-rank factors, kept entries), or
            `scales+uncompressed`, also tensors that are stored whole, such as norms.
        loss: what is made small, by its name in `LOSSES`.
        seed: decides the order of the batches.
        overwrite: replace an artifact that is there.
        progress: called with (done, in all, what is done).

    Raises:
        BaseMismatchError: this is not the base that the delta was made from.
        CheckpointError: a model cannot be loaded or run, or this is not the fine-tune that the delta was made from.
        DataError: the text cannot be used, or a setting makes no sense.
        ArtifactError: `out` may not be replaced or cannot be written.
        DeltakeeperError: the artifact has nothing to train, or a form that cannot be healed.
    """
    _check_settings(steps, batch, length, samples, lr, trainable, loss)
    started = time.monotonic()
    artifact = delta if isinstance(delta, DeltaArtifact) else open_artifact(delta)
    check_forms(artifact)
    with ExitStack() as stack:
        origin = stack.enter_context(opened(base))
        target = stack.enter_context(opened(tuned, base=origin))
        writer = stack.enter_context(ArtifactWriter(Path(out), overwrite, (artifact.path, origin.path, target.path)))
        check_models(artifact, origin, target)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deltakeeper-heal-")))
        folder = tuned_folder(target, origin, scratch)
        batches = read_batches(folder, text, samples, length, batch)
        spool = spool_teacher(folder, batches, scratch, progress)
        model = load_decoder(student_folder(origin, artifact, scratch)).to(working_device())
        student = build_student(model, artifact, trainable)
        if not student.trained:
            raise DeltakeeperError(f"{artifact.path} has no values to train; choose 'scales+uncompressed'.")
        frozen = checksums(model)
        fit = Fit(student, spool, loss)
        terms = fit.train(steps, lr, seed, progress)
        if checksums(model) != frozen:
            raise DeltakeeperError("a frozen weight was written to while healing; report this as a bug.")
        values = sum(step.numel() for step in student.parameters())
        seconds = time.monotonic() - started
        report = HealReport(fit.before, fit.best, bool(terms), values, fit.steps, fit.tokens, seconds)
        del model, student, fit, spool
        gc.collect()
        settings: dict[str, Any] = {
            "steps": steps,
            "batch": batch,
            "length": length,
            "lr": lr,
            "trainable": trainable,
            "loss": loss,
            "seed": seed,
        }
        if isinstance(text, (str, Path)):
            settings["text"] = str(text)
        write_healed(writer, artifact, origin, target, terms, {**settings, **report.to_json()})
    return report


def check_models(artifact: DeltaArtifact, base: Checkpoint, tuned: Checkpoint) -> None:
    """Refuse another base than the artifact's, and another fine-tune where it says which it was made from."""
    pair(base, tuned)  # raises if the two do not belong together
    for name in artifact.names:
        if artifact.record(name).encoding != "tied":
            check_base(base, artifact, name, artifact.record(name))
    check_tuned(artifact, tuned)


def _check_settings(steps: int, batch: int, length: int, samples: int, lr: float, trainable: str, loss: str) -> None:
    for name, value, least in (
        ("steps", steps, 1),
        ("batch", batch, 1),
        ("length", length, 2),
        ("samples", samples, 2),
    ):
        if value < least:
            raise DataError(f"healing with {name} = {value} makes no sense; give at least {least}.")
    if not (math.isfinite(lr) and lr > 0):
        raise DataError(f"healing with a learning rate of {lr} makes no sense; give a number above 0.")
    if trainable not in get_args(Trainable):
        raise DataError(f"healing cannot train '{trainable}'; choose {' or '.join(get_args(Trainable))}.")
    if loss not in LOSSES:
        raise DataError(f"healing knows no loss '{loss}'; choose {' or '.join(LOSSES)}.")
