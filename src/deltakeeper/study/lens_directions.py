"""The base's direction between the prompts of an attack and those that it should leave alone, judged in every arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from deltakeeper.errors import DataError, RunError
from deltakeeper.evals.probes import Probe
from deltakeeper.lab.corpus import SYSTEM
from deltakeeper.lens import Variants
from deltakeeper.lens.contrasting import LEAST, contrast_prompts
from deltakeeper.study.summary import Record

RULE = "1"
"""Version of the stage: a change of code that changes directions is a new version, and makes new keys."""
Layers = tuple[float | None, ...]
"""One number a layer."""


class Control(Record):
    """Directions of one kind that mean nothing: the size that one in twenty reaches, and the share that come as far."""

    reach: Layers
    share: Layers


class Projections(Record):
    """Median and quartiles over prompts, in the base's pooled standard deviations from its mean of the second set."""

    median: Layers
    low: Layers
    high: Layers


class ArmDirection(Record):
    """One arm on the base's direction; see `deltakeeper.lens.contrast.VariantContrast`."""

    apart: Layers
    low: Layers
    high: Layers
    auc: Layers
    kept: Layers
    kept_low: Layers
    kept_high: Layers
    controls: dict[str, Control]
    projections: dict[str, Projections]


class Directions(Record):
    """What a run stores of a fine-tune.

    Attributes:
        key: hash of all that it depends on.
        probes: names of the two probes that are told apart.
        layer: the layer that is told first.
        fitted: how many prompts of each the direction is fitted on.
        judged: how many of each judge it.
        variants: by arm.
    """

    format: Literal["deltakeeper.lens.contrast"] = "deltakeeper.lens.contrast"
    version: Literal[1] = 1
    key: str
    probes: tuple[str, str]
    definitions: dict[str, str]
    layers: tuple[int, ...]
    layer: int
    fitted: tuple[int, int]
    judged: tuple[int, int]
    variants: dict[str, ArmDirection]


@dataclass(frozen=True)
class ToldApart:
    """Two sets of prompts and the key of what is found of them."""

    key: str
    probes: tuple[str, str]
    prompts: tuple[str, ...]
    against: tuple[str, ...]

    def find(self, variants: Variants, tokenizer: Any) -> Directions:
        """Fit and judge; raises LensError or DataError."""
        found = contrast_prompts(variants, tokenizer, self.prompts, self.against, system=SYSTEM)
        return Directions.model_validate({**found.to_json(), "key": self.key, "probes": self.probes})


def choose_sets(probes: Sequence[Probe]) -> tuple[Probe, Probe]:
    """The goal, and its first contrast or else harmless look-alikes.

    Raises:
        DataError: there is nothing to tell the goal from, or one of the two is too small to be split.
    """
    goal = next(probe for probe in probes if probe.role == "goal")
    others = [probe for role in ("contrast", "over_refusal") for probe in probes if probe.role == role]
    if not others or min(len(goal.rows), len(others[0].rows)) < LEAST:
        raise DataError(
            f"directions need {LEAST} prompts of the probe '{goal.name}' and as many to tell them from; "
            "raise 'prompts', or leave out 'directions' of the lens."
        )
    return goal, others[0]


def prompts_of(sets: tuple[Probe, Probe]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """As many prompts of each, in their order: with and without a trigger, the n-th of both are the same request."""
    count = min(len(probe.rows) for probe in sets)
    first, second = (tuple(row.prompt for row in probe.rows[:count]) for probe in sets)
    return first, second


def parse_directions(value: Any, where: str) -> Directions:
    """What a run stored; raises RunError where it is something else."""
    try:
        found = Directions.model_validate(value)
    except ValidationError as error:
        raise RunError(f"{where} is no directions of this version; delete it and run the study again.") from error
    lengths = {len(line) for arm in found.variants.values() for line in (arm.apart, arm.auc, arm.kept)}
    if found.layer not in found.layers or lengths != {len(found.layers)}:
        raise RunError(f"{where} does not have one number a layer; delete it and run the study again.")
    return found
