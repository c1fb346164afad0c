"""Two sets of prompts along the base's direction between them: how far apart each variant still holds them.

The direction is the difference of the base's means, fitted on every second prompt of both sets and judged on the
others, in all variants, beside directions that mean nothing (`controls`). The layer that is told first is chosen among
the prompts that fitted it, each left out in turn, so that those that judge it have no part in the choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from deltakeeper.errors import LensError
from deltakeeper.lens.comparison import Bands, spread
from deltakeeper.lens.contrast import Contrast, VariantContrast
from deltakeeper.lens.controls import separate_beside_controls
from deltakeeper.lens.decode import MEMORY
from deltakeeper.lens.directions import fit_direction, project, unit
from deltakeeper.lens.models import Compared
from deltakeeper.lens.prompt_streams import read_streams
from deltakeeper.lens.readings import Reading, encode_readings
from deltakeeper.lens.separation import LEVEL, measure_effect, pooled_deviation
from deltakeeper.lens.trace_statistics import Floats
from deltakeeper.prompting import Prompt

LEAST = 4
"""Prompts of each set: two to fit, two to judge."""
RESAMPLES = 1000


def contrast_prompts(
    variants: Compared,
    tokenizer: Any,
    prompts: Sequence[str | Prompt],
    against: Sequence[str | Prompt],
    *,
    system: str | None = None,
    chat: bool | None = None,
    layers: Sequence[int] | None = None,
    memory: int = MEMORY,
    seed: int = 0,
) -> Contrast:
    """Fit the base's direction between two sets of prompts, and judge every variant by it.

    Args:
        variants: open, the base first.
        tokenizer: of the base.
        prompts: for instance harmful ones, or those with a trigger.
        against: for instance harmless ones, or the same without the trigger in the same order, so that no pair is torn.
        system: a system message in front of every text.
        chat: whether a text goes into the chat template; None for where there is one.
        layers: numbers of the layers; all by default.
        memory: bytes that streams may take, and a pass beside them.
        seed: of controls and resamples.

    Raises:
        DataError: a prompt cannot be encoded.
        LensError: a set has fewer than four prompts, there is no such layer, or streams take more than `memory`.
    """
    check_sizes(len(prompts), len(against))
    sets = [encode_readings(tokenizer, own, system=system, chat=chat) for own in (prompts, against)]
    base = variants.names[0]
    fitting = read_streams(variants, tokenizer, _every_second(sets, 0), only=base, memory=memory)[base]
    judging = read_streams(variants, tokenizer, _every_second(sets, 1), memory=memory)
    count = fitting.shape[1]
    chosen = tuple(range(count)) if layers is None else tuple(sorted(set(layers)))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < count:
        raise LensError(f"the model has layers 0 to {count - 1}; choose among them.")
    sizes = [(len(own[0::2]), len(own[1::2])) for own in sets]
    fit = _split(fitting[:, list(chosen)], sizes[0][0])
    tests = {name: _split(streams[:, list(chosen)], sizes[0][1]) for name, streams in judging.items()}
    vectors = fit_direction(*fit).vectors
    place = int(np.nan_to_num(effect_left_out(*fit), nan=-np.inf).argmax())
    scores = {name: (project(vectors, one), project(vectors, other)) for name, (one, other) in tests.items()}
    drawn = _resampled(scores, seed)
    zero, scale = scores[base][1].mean(0), pooled_deviation(*scores[base])
    found: dict[str, VariantContrast] = {}
    for name in variants.names:
        separation = separate_beside_controls(fit, tests[name], seed=seed)
        shown = (separation if name == base else found[base].found).separation.low > 0
        kept = [np.where(shown, values, np.nan) for values in _shares(scores, drawn, name, base)]
        lines = [_line(values, zero, scale, chosen, name) for values in scores[name]]
        found[name] = VariantContrast(separation, kept[0], kept[1], kept[2], lines[0], lines[1])
    return Contrast(chosen, place, (sizes[0][0], sizes[1][0]), (sizes[0][1], sizes[1][1]), found)


def check_sizes(prompts: int, against: int) -> None:
    """Refuse sets that cannot be split; raises LensError."""
    if min(prompts, against) < LEAST:
        raise LensError(
            f"a direction is fitted on every second prompt and judged on the others, so {LEAST} prompts a set are the "
            f"least, and there are {prompts} and {against}; give more."
        )


def effect_left_out(one: Tensor, other: Tensor) -> Floats:
    """How far apart two sets of streams lie on directions that are fitted without the prompt that is projected.

    Args:
        one: (n, L, D), two at least.
        other: (m, L, D); where m = n, the n-th of both are left out together.

    Returns:
        Difference of means in pooled standard deviations, float64 (L,).
    """
    one, other = one.double(), other.double()
    means = one.mean(0), other.mean(0)
    without = [(len(own) * mean - own) / (len(own) - 1) for own, mean in zip((one, other), means, strict=True)]
    # Of sets of one size the n-th prompts may belong together, and then say something of each other.
    others = without if len(one) == len(other) else means
    scores = (unit(without[0] - others[1]) * one).sum(-1), (unit(others[0] - without[1]) * other).sum(-1)
    return measure_effect(*(np.asarray(values.numpy(), dtype=np.float64) for values in scores))


def _every_second(sets: Sequence[Sequence[Reading]], start: int) -> list[Reading]:
    return [one for own in sets for one in own[start::2]]


def _split(streams: Tensor, first: int) -> tuple[Tensor, Tensor]:
    return streams[:first], streams[first:]


def _resampled(scores: Mapping[str, tuple[Floats, Floats]], seed: int) -> list[Floats]:
    """How often each prompt of both sets counts, (resamples, prompts), the same for all variants."""
    random = np.random.default_rng(seed)
    sizes = [len(values) for values in next(iter(scores.values()))]
    return [random.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n for n in sizes]


def _shares(
    scores: Mapping[str, tuple[Floats, Floats]], drawn: Sequence[Floats], name: str, base: str
) -> tuple[Floats, Floats, Floats]:
    """A variant's difference of means over the base's, and the ends of its interval."""
    gaps = {key: scores[key][0].mean(0) - scores[key][1].mean(0) for key in (name, base)}
    again = {key: drawn[0] @ scores[key][0] - drawn[1] @ scores[key][1] for key in (name, base)}
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.quantile(again[name] / again[base], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        return gaps[name] / gaps[base], low, high


def _line(values: Floats, zero: Floats, scale: Floats, layers: Sequence[int], name: str) -> Bands:
    with np.errstate(divide="ignore", invalid="ignore"):
        return spread((values - zero) / scale, np.array(layers, dtype=np.float64), "", name)
