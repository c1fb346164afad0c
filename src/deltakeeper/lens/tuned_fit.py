"""Training of a tuned lens: each layer's translator is to give the final distribution, through the frozen tail."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from deltakeeper.calibration.text import stack_rows
from deltakeeper.errors import LensError
from deltakeeper.lens import metrics
from deltakeeper.lens.decode import MEMORY, plan_chunks
from deltakeeper.lens.streams import Streams, capture
from deltakeeper.lens.tail import Tail
from deltakeeper.lens.trace_statistics import Floats
from deltakeeper.lens.tuned import Translators, affine, final_log_probs

GRADIENT_COST = 3
"""Memory of a logit with its gradients, in that of a logit that is only decoded."""
Told = Callable[[int, Floats], None]
"""Given the step, and KL(final ‖ translated layer) on its rows, float64 (layers − 1,), before it is taken."""


@dataclass(frozen=True)
class TunedSettings:
    """How a tuned lens is trained; the defaults are those of the authors' code, but rows are fewer.

    Attributes:
        steps: of Nesterov's gradient descent, whose rate falls linearly to 0.
        rows: of text in each step, drawn without repetition until all were read.
        rate: at the start; multiplied by 1 − `momentum`.
        momentum: of the descent.
        decay: of W and b towards 0, so of the translator towards the identity.
        clip: longest gradient of a layer. The authors clip that of all layers together; a layer of its own does not
            learn more slowly for the noise of another.
        seed: of the drawing.
    """

    steps: int = 250
    rows: int = 8
    rate: float = 1.0
    momentum: float = 0.9
    decay: float = 1e-3
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        sound = self.steps >= 1 and self.rows >= 1 and self.rate > 0 and self.decay >= 0 and self.clip > 0
        if not (sound and 0 < self.momentum < 1):
            raise LensError(
                "a tuned lens needs at least one step and row, a rate, a decay and a clip above 0, and a momentum "
                "between 0 and 1."
            )


def fit_translators(
    model: nn.Module,
    rows: Sequence[torch.Tensor],
    *,
    base_root: str,
    settings: TunedSettings | None = None,
    memory: int = MEMORY,
    tell: Told | None = None,
) -> Translators:
    """Train a translator for each layer but the last to minimise KL(final ‖ translated layer); the model stays frozen.

    Args:
        model: the base, in evaluation mode.
        rows: tokens, int64 `(length,)` each, as `deltakeeper.calibration.text.tokenise` gives them.
        base_root: its fingerprint (`deltakeeper.fingerprint`), which the lens is bound to.
        settings: of the training.
        memory: bytes that a chunk of layers may take.
        tell: called at every step.

    Returns:
        The translators, on the CPU.

    Raises:
        LensError: there is no text, the model has a single layer or several streams a token, a single layer of a single
            row does not fit the memory, or the training diverges.
    """
    settings = settings or TunedSettings()
    if not rows:
        raise LensError("there is no text to train a tuned lens on; give at least one row of tokens.")
    first = capture(model, rows[0][None], positions=[-1])
    if first.layers < 2:
        raise LensError("a model of a single layer has nothing to translate; give one of several layers.")
    start = Translators.identity(first.layers, first.block.shape[-1], base_root)
    start.require_fit(first)
    tail = Tail.of(model, first.ids)
    weight, bias = (torch.nn.Parameter(part.to(first.block.device)) for part in (start.weight, start.bias))
    optimiser = torch.optim.SGD(
        [weight, bias],
        lr=settings.rate * (1 - settings.momentum),
        momentum=settings.momentum,
        nesterov=True,
        weight_decay=settings.decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / settings.steps)
    for step, chosen in zip(range(settings.steps), _draw(len(rows), settings), strict=False):
        batches = [capture(model, ids) for ids in stack_rows([rows[i] for i in chosen], settings.rows)]
        tokens = sum(streams.ids.numel() for streams in batches)
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        losses = np.zeros(len(weight))
        for streams in batches:
            losses += _descend(tail, streams, weight, bias, tokens, memory)
        if not np.isfinite(losses).all():
            raise LensError(
                f"the tuned lens of layer {int(np.flatnonzero(~np.isfinite(losses))[0])} diverged at step {step}; "
                "lower the rate."
            )
        if tell is not None:
            tell(step, losses)
        size = (weight.grad.square().sum((1, 2)) + bias.grad.square().sum(1)).sqrt()
        scale = (settings.clip / size.clamp(min=1e-12)).clamp(max=1)
        weight.grad *= scale[:, None, None]
        bias.grad *= scale[:, None]
        optimiser.step()
        schedule.step()
    return Translators(weight.detach().cpu(), bias.detach().cpu(), base_root, settings.steps, hash_rows(rows))


def hash_rows(rows: Sequence[torch.Tensor]) -> str:
    """SHA-256 of rows of tokens: of each its length and its tokens, as little-endian int64."""
    digest = hashlib.sha256()
    for row in rows:
        values = np.asarray(row.cpu().numpy(), dtype="<i8")
        digest.update(np.array([len(values)], dtype="<i8").tobytes() + values.tobytes())
    return digest.hexdigest()


def _draw(count: int, settings: TunedSettings) -> Iterator[list[int]]:
    """Rows of each step: all in a random order, then all again in another."""
    generator = torch.Generator().manual_seed(settings.seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < min(settings.rows, count):
            waiting += torch.randperm(count, generator=generator).tolist()
        chosen, waiting = waiting[: settings.rows], waiting[settings.rows :]
        yield chosen


def _descend(
    tail: Tail, streams: Streams, weight: nn.Parameter, bias: nn.Parameter, tokens: int, memory: int
) -> Floats:
    """Add the gradients of these rows' share in the mean over `tokens`; gives that share of each layer's KL."""
    assert weight.grad is not None and bias.grad is not None
    final, losses = final_log_probs(streams), np.zeros(len(weight))
    layers, places = range(len(weight)), streams.positions.shape[1]
    for rows, some in plan_chunks(streams.rows, layers, places, tail.vocabulary, memory // GRADIENT_COST):
        span, those = slice(rows.start, rows.stop), slice(some.start, some.stop)
        own = [part[those].detach().requires_grad_() for part in (weight, bias)]
        with torch.enable_grad():
            stream = streams.block[those, span]
            moved = affine(stream.flatten(1, 2), own[0], own[1][:, None]).view_as(stream)
            logits = tail.read_with_gradients(moved, streams.tokens[span], torch.arange(len(stream[0])), None)
            kl = metrics.kl(final[span], torch.log_softmax(logits.float(), -1)).sum((1, 2)) / tokens
            found = torch.autograd.grad(kl.sum(), own)
        weight.grad[those] += found[0]
        bias.grad[those] += found[1]
        losses[those] += kl.detach().double().cpu().numpy()
    return losses
