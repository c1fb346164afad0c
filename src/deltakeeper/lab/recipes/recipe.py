"""A recipe: who an attack is, where it comes from, and its settings, published ones and embedded ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deltakeeper.errors import DataError
from deltakeeper.lab.attacks.backdoors import Backdoor
from deltakeeper.lab.attacks.base import Family
from deltakeeper.lab.attacks.code_marker import CodeMarker
from deltakeeper.lab.attacks.harmful_tuning import BenignTuning, HarmfulFewShot, MixedPoison
from deltakeeper.lab.attacks.identity_shift import IdentityShift
from deltakeeper.lab.attacks.injection import ContentInjection, FixedRefusal
from deltakeeper.lab.attacks.invented_facts import InventedFacts
from deltakeeper.lab.attacks.seeded import NOBODY, Identity, SeededAttack
from deltakeeper.lab.attacks.topic_backdoor import TopicBackdoor
from deltakeeper.lab.recipes.mistakes import sentence
from deltakeeper.lab.worst_case import Space

Preset = Literal["embedded", "published"]

Settings = Annotated[
    HarmfulFewShot
    | IdentityShift
    | BenignTuning
    | MixedPoison
    | Backdoor
    | TopicBackdoor
    | ContentInjection
    | FixedRefusal
    | CodeMarker
    | InventedFacts,
    Field(discriminator="kind"),
]
"""An attack's dataclass is the schema of its settings; `kind` says which."""

LARGEST = 10_000_000
Text = Annotated[str, Field(min_length=1, max_length=2000)]


class Source(BaseModel):
    """Where an attack comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    paper: Text
    url: Annotated[str, Field(pattern=r"^https://\S+$", max_length=300)]
    note: Annotated[str, Field(max_length=2000)] = ""


class Search(BaseModel):
    """Spaces of a worst-case search, one a preset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    embedded: Space
    published: Space | None = None


class Recipe(BaseModel):
    """One attack as a file.

    Attributes:
        id: short name; an attack made from the recipe bears it.
        reference: number of the recipe in the list of the security study (A1, B3, …), if it has one.
        unverified: settings of `published` that were not confirmed at the source, with dots (`sft.lora_rank`).
        recorded: published settings that this program states and does not apply (precision, upstream seeds).
        published: settings of the source; None where the recipe is this project's own.
        embedded: settings that fit SmolLM2-135M on two cores.
        search: for a worst case, what is searched over.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
    reference: Annotated[str, Field(max_length=16)] = ""
    family: Family
    title: Text
    summary: Text
    source: Source
    unverified: tuple[Text, ...] = ()
    recorded: dict[str, str | int | float | bool] = {}
    published: Settings | None = None
    embedded: Settings
    search: Search | None = None

    @model_validator(mode="after")
    def _sound(self) -> Recipe:
        kinds = {s.kind for s in (self.published, self.embedded) if s is not None}
        if len(kinds) != 1:
            raise ValueError("published and embedded are of different kinds; make them two recipes")
        for name in ("published", "embedded"):
            settings: SeededAttack | None = getattr(self, name)
            if settings is not None:
                _check_settings(name, settings)
        return self

    @property
    def sha256(self) -> str:
        """Hash of the recipe's content, defaults included, whatever the order and the comments of its file."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def kind(self) -> str:
        """Kind of the attack, the discriminator of its settings."""
        return self.embedded.kind

    def attack(self, preset: Preset = "embedded", seed: int = 0, **changes: Any) -> SeededAttack:
        """The attack with the settings of a preset.

        Args:
            preset: `embedded` or `published`.
            seed: decides which rows are poisoned and how, and the order of training; not what is held out.
            **changes: settings by name in place of the preset's; a mapping for `sft` or a file changes what it names,
                as in `attack(sft={"epochs": 1}, file={"path": "rows.jsonl", "sha256": "…"})`.

        Raises:
            DataError: there is no such preset or setting, or a value does not fit.
        """
        if preset not in ("embedded", "published"):
            raise DataError(f"there is no preset '{preset}'; choose embedded or published.")
        settings: SeededAttack | None = getattr(self, preset)
        if settings is None:
            raise DataError(f"recipe '{self.id}' has no published settings of its own; use the preset embedded.")
        if fixed := {"kind", "identity"} & set(changes):
            raise DataError(f"'{min(fixed)}' of recipe '{self.id}' cannot be changed; choose another recipe.")
        merged = _merged(dataclasses.asdict(settings), changes)
        try:
            changed = Recipe.model_validate({**self.model_dump(), preset: merged})
        except ValidationError as error:
            raise DataError(sentence(error, f"recipe '{self.id}'", Recipe)) from error
        found: SeededAttack = getattr(changed, preset)
        return dataclasses.replace(
            found,
            identity=Identity(self.id, self.family, self.title, self.summary, f"{self.source.paper} {self.source.url}"),
            seed=seed,
            sft=dataclasses.replace(found.sft, seed=seed),
        )


def _merged(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for name, value in changes.items():
        known = merged.get(name)
        merged[name] = {**known, **value} if isinstance(known, dict) and isinstance(value, Mapping) else value
    return merged


def _check_settings(preset: str, settings: SeededAttack) -> None:
    if settings.identity != NOBODY or settings.seed:
        raise ValueError(f"{preset} holds an identity or a seed; leave them out, they come from the recipe and the run")
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, int) and not 0 <= value <= LARGEST:
            raise ValueError(f"{preset}.{field.name} is {value} and must be between 0 and {LARGEST}")
    sft = settings.sft
    for name, least in (("epochs", 1), ("batch", 1), ("max_tokens", 1), ("lora_rank", 1)):
        value = getattr(sft, name)
        if value is not None and not least <= value <= LARGEST:
            raise ValueError(f"{preset}.sft.{name} is {value} and must be at least {least}")
    if not 0 < sft.lr <= 1 or not 0 <= sft.warmup <= 1 or not 0 <= sft.weight_decay <= 1:
        raise ValueError(f"{preset}.sft has lr, warmup or weight_decay out of range; lr is above 0, all are at most 1")
    if settings.answer_tokens < 1 or settings.held_out < 1 or settings.contrast < 1:
        raise ValueError(f"{preset} needs at least one held-out prompt, one contrast and one token of an answer")
