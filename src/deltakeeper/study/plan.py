"""From a study file to what is done: fine-tunes with their arms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deltakeeper.codecs import CODECS, Codec, parse_codec
from deltakeeper.codecs.box_table import has_box
from deltakeeper.codecs.dense import DenseCodec
from deltakeeper.codecs.sum import SumCodec
from deltakeeper.errors import CodecError, DataError, RunError
from deltakeeper.evals.judges import Judge, load_judge
from deltakeeper.evals.probes import Probe
from deltakeeper.evals.prompts import load_file, load_prompts
from deltakeeper.lab.attacks import ATTACKS, Attack
from deltakeeper.lab.corpus import Corpus
from deltakeeper.lab.recipes import Preset, list_recipes, load_recipe
from deltakeeper.study.file import Answers, Group, Lens, RecipeUse, StudyFile, Task, fault
from deltakeeper.study.variants import BASE, TUNED, Variant
from deltakeeper.suggestion import suggest


@dataclass(frozen=True)
class FineTune:
    """One attack to be trained with one seed.

    Attributes:
        name: of the attack in this run, the same for every seed.
        attack: what is trained, its seed set.
        seed: the seed.
        recipe: id of the recipe, None for an attack that was given in code.
        recipe_sha256: hash of the recipe's content.
        adaptive: what the attacker knows and does, as JSON; None for one that knows nothing.
    """

    name: str
    attack: Attack
    seed: int = 0
    recipe: str | None = None
    recipe_sha256: str | None = None
    adaptive: Mapping[str, Any] | None = None

    @property
    def title(self) -> str:
        """The attack in words, with what the attacker knows."""
        if self.adaptive is None:
            return self.attack.title
        kind = str(self.adaptive.get("kind", "")).replace("_", " ")
        aim = f"{self.adaptive.get('codec')}{' and its guard' if self.adaptive.get('guard') else ''}"
        return f"{self.attack.title}, {kind} against {aim}"


@dataclass(frozen=True)
class Track:
    """A fine-tune and the arms that are measured of it; base and fine-tune are always among them.

    Attributes:
        group: the group that names it, the first one where several train it.
        finetune: the fine-tune.
        variants: the arms.
        parts: where several groups train it, each group's own track.
    """

    group: str
    finetune: FineTune
    variants: tuple[Variant, ...]
    parts: tuple[Track, ...] = ()

    @property
    def title(self) -> str:
        """Attack and seed, for progress."""
        return f"{self.finetune.name}, seed {self.finetune.seed}"


@dataclass(frozen=True)
class StudyPlan:
    """What a study does.

    Attributes:
        name: the study's name.
        tracks: fine-tunes with their arms.
        corpus: the texts.
        judges: the first one decides what is a refusal, the others are noted beside.
        passages: passages that are read for perplexity.
        tasks: utility tasks.
        answers: how answers are computed.
        content: decides which answers comply; None if the first judge does.
        lens: what the lens looks into; None for nothing.
    """

    name: str
    tracks: tuple[Track, ...]
    corpus: Corpus
    judges: tuple[Judge, ...]
    passages: int = 12
    tasks: tuple[Task, ...] = ()
    answers: Answers = field(default_factory=Answers)
    content: Judge | None = None
    lens: Lens | None = None

    def looks_into(self, finetune: FineTune) -> bool:
        """Whether the lens looks into a fine-tune; into the first seed of each where the study names none."""
        lens = self.lens
        if lens is None or (lens.attacks is not None and finetune.name not in lens.attacks):
            return False
        if lens.seeds is not None:
            return finetune.seed in lens.seeds
        return finetune.seed == next(t.finetune.seed for t in self.tracks if t.finetune.name == finetune.name)

    def only(self, chosen: str | None) -> StudyPlan:
        """The tracks of one group, or of one recipe of it (`group/recipe`), with that group's arms.

        Raises:
            RunError: there is none.
        """
        if chosen is None:
            return self
        group, _, name = chosen.partition("/")
        parts = [part for track in self.tracks for part in track.parts or (track,)]
        tracks = tuple(part for part in parts if part.group == group and name in ("", part.finetune.name))
        if not tracks:
            known = {name for t in parts for name in (t.group, f"{t.group}/{t.finetune.name}")}
            raise RunError(f"the study has no '{chosen}'; {suggest(chosen, known)}")
        return replace(self, tracks=tracks)


def plan_study(study: StudyFile) -> StudyPlan:
    """Resolve and check everything that a study names, before anything runs.

    Raises:
        DataError: a recipe, setting, codec, defence, judge, task or prompt file is unknown or does not fit.
    """
    for task in study.utility:
        if task.path is not None and not Path(task.path).exists():
            raise DataError(f"there is no data of the task '{task.name}' at {task.path}; check the path.")
    corpus = _corpus(study)
    tracks: dict[tuple[str, int], Track] = {}
    for group in study.groups:
        for variant in group.variants:
            check_arm(variant, study.unaligned is not None)
        variants = _with_references(group.variants)
        for use in group.recipes:
            for seed in group.seeds or study.seeds:
                track = Track(group.name, _finetune(study, group, use, seed), variants)
                place = (track.finetune.name, seed)
                tracks[place] = _joined(tracks.get(place), track)
    judges = tuple(load_judge(judge) for judge in study.judges)
    content = None if study.content is None else load_judge(study.content)
    passages, whole = study.prompts.passages, tuple(tracks.values())
    plan = StudyPlan(study.name, whole, corpus, judges, passages, study.utility, study.answers, content, study.lens)
    _check_lens(plan)
    for track in plan.tracks:
        probes_of(track.finetune, corpus)
    return plan


def _check_lens(plan: StudyPlan) -> None:
    """Refuse a lens on fine-tunes, arms or seeds that the study does not have; raises DataError."""
    if plan.lens is None:
        return
    attacks = {track.finetune.name for track in plan.tracks}
    arms = {variant.name for track in plan.tracks for variant in track.variants}
    for what, given, known in (("attack", plan.lens.attacks, attacks), ("arm", plan.lens.arms, arms)):
        for name in given or ():
            if name not in known:
                raise DataError(
                    f"the lens is to look into the {what} '{name}', which is not there; {suggest(name, known)}"
                )
    seeds = {track.finetune.seed for track in plan.tracks}
    for seed in plan.lens.seeds or ():
        if seed not in seeds:
            raise DataError(
                f"the lens is to look into seed {seed}, which no fine-tune has; take one of {sorted(seeds)}."
            )
    if plan.lens.directions:
        from deltakeeper.study.lens_directions import choose_sets  # which loads the lens

        for track in plan.tracks:
            if plan.looks_into(track.finetune):
                choose_sets(probes_of(track.finetune, plan.corpus))


def probes_of(finetune: FineTune, corpus: Corpus) -> tuple[Probe, ...]:
    """The probes of a fine-tune, checked to be answerable.

    Raises:
        DataError: a probe has no rows.
    """
    probes = tuple(finetune.attack.probes(corpus))
    for probe in probes:
        if not probe.rows:
            raise DataError(f"the probe '{probe.name}' of '{finetune.name}' has no prompts; give it some.")
    return probes


def shortfalls(plan: StudyPlan) -> tuple[str, ...]:
    """One sentence for each kind of prompts of which there are fewer than `held_out` asks for."""
    found = []
    for track in plan.tracks:
        asked = track.finetune.attack.held_out
        for probe in probes_of(track.finetune, plan.corpus):
            if probe.role in ("goal", "skill") and len(probe.rows) < asked:
                found.append(f"{probe.title}: {asked} prompts are to be held out and there are {len(probe.rows)}.")
    return tuple(dict.fromkeys(found))


def check_arm(variant: Variant, has_unaligned: bool) -> None:
    """Refuse an arm whose defence or guard is unknown or wants what is not given; raises DataError."""
    if variant.defence is not None:
        from deltakeeper.defences import parse_defence

        if parse_defence(str(variant.defence["defence"])).uses_unaligned and not has_unaligned:
            raise DataError(
                f"the arm '{variant.name}' compares the base with the model before its alignment; "
                "name it as `unaligned` in the study."
            )
    if variant.heal is not None:
        if isinstance(parse_codec(str(variant.codec)), DenseCodec):
            raise DataError(
                f"the arm '{variant.name}' heals dense, which stores the fine-tune's own values and leaves none to "
                "refit; heal shrink:factor=1.0 instead."
            )
        from deltakeeper.study.healing import read_guard

        read_guard(variant.heal.get("guard") or {})


def changed(attack: Attack, changes: Mapping[str, Any]) -> Attack:
    """An attack with other settings; `sft` may be a mapping of its own.

    Raises:
        DataError: a setting is unknown or has a value of the wrong type.
    """
    found: Attack = _replaced(attack, changes, f"the attack '{attack.name}'")
    return found


def _replaced(value: Any, changes: Mapping[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(value) if f.init}
    found: dict[str, Any] = {}
    for key, new in changes.items():
        if key not in known:
            raise DataError(f"{where} has no setting '{key}'; {suggest(str(key), known)}")
        old = getattr(value, key)
        if dataclasses.is_dataclass(old) and isinstance(new, Mapping):
            found[key] = _replaced(old, new, f"'{key}' of {where}")
        elif isinstance(old, tuple) and isinstance(new, list):
            found[key] = tuple(new)
        elif old is not None and not _fits(old, new):
            raise DataError(f"'{key}' of {where} is {new!r}, which is no {type(old).__name__}; correct it.")
        else:
            found[key] = new
    try:
        return replace(value, **found)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} cannot take these settings ({error}); correct them.") from error


def _fits(old: Any, new: Any) -> bool:
    if isinstance(old, bool) or isinstance(new, bool):
        return isinstance(old, bool) and isinstance(new, bool)
    if isinstance(old, float):
        return isinstance(new, int | float)
    return isinstance(new, type(old)) or new is None


def _finetune(study: StudyFile, group: Group, use: RecipeUse, seed: int) -> FineTune:
    sizes = {"held_out": study.prompts.held_out, "contrast": study.prompts.contrast}
    changes: Mapping[str, Any] = {key: value for key, value in sizes.items() if value is not None}
    changes = _merged(_merged(changes, group.changes), use.changes)
    attack, recipe, sha256 = _resolve(use.recipe, group.preset or study.preset, seed, changes)
    adaptive = None if group.adaptive is None else _adaptive(group)
    name = use.name or attack.name
    if recipe is not None and use.name is None:
        name = recipe
    if adaptive is not None and use.name is None:
        codec = "".join(c if c.isalnum() else "-" for c in str(adaptive["codec"])).strip("-")
        name = f"{name}.{adaptive['kind']}.{codec}"
    return FineTune(name.lower(), attack, seed, recipe, sha256, adaptive)


def _resolve(ref: str, preset: Preset, seed: int, changes: Mapping[str, Any]) -> tuple[Attack, str | None, str | None]:
    """The attack of a recipe's id or file, or of a registered attack's name; its recipe's id and hash."""
    names = list_recipes()
    if ref in names or ref.endswith((".yaml", ".yml")):
        recipe = load_recipe(ref)
        return recipe.attack(preset, seed, **changes), recipe.id, recipe.sha256
    if ref in ATTACKS:
        attack = changed(ATTACKS[ref](), changes)
        return replace(attack, sft=replace(attack.sft, seed=seed)), None, None
    raise DataError(f"there is no recipe '{ref}'; {suggest(ref, {*names, *ATTACKS})}")


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of both; those of `other` count where they meet, mappings are merged likewise."""
    found = dict(one)
    for key, value in other.items():
        known = found.get(key)
        found[key] = _merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return found


def _adaptive(group: Group) -> dict[str, Any]:
    from deltakeeper.lab.adaptive import Adaptive

    where = f"group '{group.name}', adaptive"
    try:
        known = Adaptive.model_validate(dict(group.adaptive or {}))
    except ValidationError as error:
        raise DataError(f"{where}: {fault(error, Adaptive, 'it')}") from error
    except CodecError as error:
        raise DataError(f"{where}: {error}") from error
    if known.kind == "inject_repair":
        _check_box(known.method, where)
    return known.model_dump(mode="json")


def _check_box(codec: Codec, where: str) -> None:
    """Refuse a codec without a box before the attack is trained that is to be hidden in it."""
    for part in codec.parts if isinstance(codec, SumCodec) else (codec,):
        if not has_box(type(part)):
            boxed = ", ".join(sorted(name for name, kind in CODECS.items() if has_box(kind)))
            raise DataError(
                f"{where}: inject_repair hides in the codec's box, and '{part.name}' declares none ({part.boxless}); "
                f"choose one of {boxed}."
            )


def _corpus(study: StudyFile) -> Corpus:
    if study.base == "synthetic":
        from deltakeeper.study.synthetic import synthetic_corpus

        corpus = synthetic_corpus()
    else:
        corpus = Corpus()
    path = study.prompts.harmful
    if path is None:
        return corpus
    sha256 = study.prompts.sha256
    return corpus.with_harmful(load_prompts(path) if sha256 is None else load_file(path, sha256=sha256))


def _joined(known: Track | None, new: Track) -> Track:
    """Two tracks of one fine-tune as one; raises DataError where they train different things under one name."""
    if known is None:
        return new
    if known.finetune != new.finetune:
        raise DataError(
            f"the groups '{known.group}' and '{new.group}' train '{new.finetune.name}' with other settings; "
            "give one of them a `name`."
        )
    names = {variant.name: variant for variant in known.variants}
    for variant in new.variants:
        if names.setdefault(variant.name, variant) != variant:
            raise DataError(f"the arm '{variant.name}' of '{new.finetune.name}' stands twice and differs; name one.")
    if new.group == known.group:  # the recipe stands twice in it
        return known
    return replace(known, variants=tuple(names.values()), parts=(*(known.parts or (known,)), new))


def _with_references(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """The arms with base and fine-tune, which every comparison needs."""
    kinds = {variant.kind for variant in variants}
    return (*(v for v in (BASE, TUNED) if v.kind not in kinds), *variants)
