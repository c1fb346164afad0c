"""Scale distillation: fit the continuous values of a compressed delta to the logits of its fine-tune.

Liu et al., "BitDelta", NeurIPS 2024, https://arxiv.org/abs/2402.10193, section 3.1, for its one scale a matrix; here
for every layout. Gradients are the true ones: they pass through the delta to the layers before it.
"""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from deltakeeper.apply import check_base
from deltakeeper.artifact import DeltaArtifact, open_artifact
from deltakeeper.calibration.inputs import load_decoder
from deltakeeper.checkpoint import Checkpoint, opened
from deltakeeper.delta import pair
from deltakeeper.errors import DataError, DeltakeeperError
from deltakeeper.heal.student import Student, Trainable, build_student, packed_terms, versions
from deltakeeper.heal.teacher import Progress, Spool, read_batches, spool_teacher
from deltakeeper.heal.write import write_healed

HELD_OUT = 8
"""One batch in so many is held out to see whether healing helped."""


@dataclass(frozen=True)
class HealReport:
    """What healing did.

    Attributes:
        before: mean squared difference of logits to the fine-tune's on held-out text, before.
        after: the same after; never above `before`, because values that are worse are not kept.
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
    text: str | Path | Sequence[torch.Tensor],
    out: str | Path,
    *,
    steps: int = 200,
    batch: int = 4,
    length: int = 128,
    samples: int = 800,
    lr: float = 1e-2,
    trainable: Trainable = "scales",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> HealReport:
    """Refit a compressed delta to its fine-tune's logits on a text, and write it as a new artifact.

    Fine-tune and base are in memory one after the other, never together. What is healed follows the fine-tune, an
    attacked one as well: measure before and after.

    Args:
        delta: the artifact.
        base: the base that it was made from.
        tuned: the fine-tune that it stands for.
        text: calibration text (`.txt` or `.jsonl`), or rows of tokens, int64.
        out: artifact folder to write; nothing is left there if anything fails.
        steps: steps of Adam, one batch each, with the rate falling to zero along a cosine.
        batch: rows in a batch.
        length: tokens in a row.
        samples: most rows; one batch in eight is held out.
        lr: learning rate relative to the root mean square of each value tensor, which makes 0.01 about the paper's 1e-4
            for scales of 0.01.
        trainable: `scales`, the values of packed terms (scales, low-rank factors, kept entries), or
            `scales+uncompressed`, also tensors that are stored whole, such as norms.
        seed: decides the order of the batches.
        overwrite: replace an artifact that is there.
        progress: called with (done, in all, what is done).

    Raises:
        BaseMismatchError: this is not the base that the delta was made from.
        CheckpointError: a model cannot be loaded or run.
        DataError: the text cannot be used, or a setting makes no sense.
        DeltakeeperError: the artifact has nothing to train, or a form that cannot be healed.
    """
    _check_settings(steps, batch, length, samples, lr, trainable)
    started = time.monotonic()
    artifact = delta if isinstance(delta, DeltaArtifact) else open_artifact(delta)
    with ExitStack() as stack:
        origin = stack.enter_context(opened(base))
        target = stack.enter_context(opened(tuned, base=origin))
        pair(origin, target)  # raises if the two do not belong together
        for name in artifact.names:
            if artifact.record(name).encoding != "tied":
                check_base(origin, artifact, name, artifact.record(name))
        batches = read_batches(target.path, text, samples, length, batch)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deltakeeper-heal-")))
        spool = spool_teacher(target.path, batches, scratch, progress)
        model = load_decoder(origin.path)
        student = build_student(model, artifact, trainable)
        if not student.trained:
            raise DeltakeeperError(f"{artifact.path} has no values to train; choose 'scales+uncompressed'.")
        frozen = dict(versions(model))
        before, after, taken, learned = _fit(student, spool, steps, lr, seed, progress)
        if dict(versions(model)) != frozen:
            raise DeltakeeperError("a frozen weight was written to while healing; report this as a bug.")
        values = sum(step.numel() for step in student.parameters())
        terms = packed_terms(student.trained) if after < before else {}
        del model, student
        gc.collect()
        report = HealReport(before, min(before, after), bool(terms), values, taken, learned, time.monotonic() - started)
        settings: dict[str, Any] = {
            "steps": steps,
            "batch": batch,
            "length": length,
            "lr": lr,
            "trainable": trainable,
            "seed": seed,
        }
        if isinstance(text, (str, Path)):
            settings["text"] = str(text)
        write_healed(artifact, origin, target, terms, Path(out), {**settings, **report.to_json()}, overwrite)
    return report


def _fit(
    student: Student, spool: Spool, steps: int, lr: float, seed: int, progress: Progress | None
) -> tuple[float, float, int, int]:
    """Train, keep the best of the values seen, and give (loss before, best loss, steps taken, tokens learned from)."""
    held = list(range(0, len(spool.batches), HELD_OUT))
    learned = [n for n in range(len(spool.batches)) if n not in held]
    before = best = _loss_on(student, spool, held)
    kept = [step.detach().clone() for step in student.parameters()]
    optimiser = torch.optim.Adam(student.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    check = max(1, steps // 4)
    for step in range(steps):
        if progress:
            progress(step, steps, "student")
        if not order:
            order = [learned[i] for i in torch.randperm(len(learned), generator=generator).tolist()]
        loss = _loss(student.model, spool, order.pop())
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        if (step + 1) % check == 0 or step + 1 == steps:
            found = _loss_on(student, spool, held)
            if found < best:
                best, kept = found, [value.detach().clone() for value in student.parameters()]
    with torch.no_grad():
        for value, good in zip(student.parameters(), kept, strict=True):
            value.copy_(good)
    return before, best, steps, sum(spool.batches[n].numel() for n in learned)


def _loss(model: nn.Module, spool: Spool, number: int) -> torch.Tensor:
    """Mean squared difference of the logits; over the tokens that both vocabularies have."""
    said: torch.Tensor = model(input_ids=spool.batches[number], use_cache=False).logits
    wanted = spool.logits(number)
    width = min(said.shape[-1], wanted.shape[-1])
    return (said[..., :width].float() - wanted[..., :width]).square().mean()


@torch.no_grad()
def _loss_on(student: Student, spool: Spool, numbers: Sequence[int]) -> float:
    total = sum(float(_loss(student.model, spool, n)) * spool.batches[n].numel() for n in numbers)
    return total / sum(spool.batches[n].numel() for n in numbers)


def _check_settings(steps: int, batch: int, length: int, samples: int, lr: float, trainable: str) -> None:
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
