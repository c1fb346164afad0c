"""What the lens looks into once the arms of a fine-tune are measured: prompts whose verdict flipped, then others.

Every trace lies under a hash of all that it depends on. Prompts are traced in blocks that the cells decide, and a block
of which anything is missing is traced as a whole, so an interrupted study ends in the bytes of one that was not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from deltakeeper.engine.tenant_files import open_checked
from deltakeeper.lab.corpus import SYSTEM
from deltakeeper.lens import Compressed, Variants
from deltakeeper.lens.tracing import trace_prompts
from deltakeeper.study.arms import Arm, Arms
from deltakeeper.study.cell_file import CellFile
from deltakeeper.study.file import Lens
from deltakeeper.study.keys import digest
from deltakeeper.study.lens_directions import RULE as DIRECTIONS_RULE
from deltakeeper.study.lens_directions import ToldApart, choose_sets, prompts_of
from deltakeeper.study.plan import Track, probes_of
from deltakeeper.study.progress import Progress
from deltakeeper.study.store import RunStore
from deltakeeper.study.variants import Variant

if TYPE_CHECKING:
    from deltakeeper.study.pipeline import Study

LENS_RULE = "1"
"""Version of the stage: a change of code that changes traces is a new version, and makes new keys."""
BLOCK = 8
ROLE = "goal"
Sample = tuple[str, str]
"""Name of the probe and id of the prompt."""


@dataclass(frozen=True)
class Look:
    """One prompt, the arms whose verdict on it is not the fine-tune's, and the key of each arm's trace."""

    sample: Sample
    prompt: str
    flipped: tuple[str, ...]
    keys: Mapping[str, str]


@dataclass(frozen=True)
class Looks:
    """All prompts of a fine-tune that are looked into.

    Attributes:
        key: names a failure.
        track: the fine-tune.
        lens: what the study says of it.
        variants: arms that are looked into, base and fine-tune first.
        blocks: prompts that are traced together.
        missing: numbers of the blocks that lack a trace.
        apart: sets of prompts that are still to be told apart; None where that is done or not asked.
        done: whether nothing is missing, the index included.
    """

    key: str
    track: Track
    lens: Lens
    variants: tuple[Variant, ...]
    blocks: tuple[tuple[Look, ...], ...]
    missing: tuple[int, ...]
    apart: ToldApart | None = None
    done: bool = False

    @property
    def needs_models(self) -> bool:
        """Whether anything is left for which arms have to be asked."""
        return bool(self.missing) or self.apart is not None

    def trace(self, study: Study, arms: Arms, made: Sequence[Arm], progress: Progress) -> None:
        """Trace the missing blocks, and tell sets of prompts apart.

        Args:
            study: the study.
            arms: the live base.
            made: the arms of `variants`, ready to be asked.
            progress: where it is shown.

        Raises:
            DeltakeeperError: an arm does not fit the base, or the lens does not fit the model.
        """
        model, tokenizer = arms.live()
        names = {kind: next(v.name for v in self.variants if v.kind == kind) for kind in ("base", "tuned")}
        tenants = [a for a in made if arms.source == "engine" and a.variant.is_tenant and a.artifact is not None]
        whole = [a for a in made if a not in tenants and a.variant.kind != "base"]
        deltas = {
            a.variant.name: Compressed(open_checked(a.artifact.path, arms.root), a.variant.planes)
            for a in tenants
            if a.artifact is not None
        }
        about: dict[str, dict[str, Any]] = {names["base"]: {"base": study.bases.name}}
        for arm in made:
            if arm.artifact is not None:
                found = {
                    "delta": arm.artifact.manifest_sha256,
                    "codec": arm.variant.codec,
                    "planes": arm.variant.planes,
                }
                about[arm.variant.name] = found
        values = {a.variant.name: arms.changes(a) for a in whole}
        label = f"{self.track.title}: lens"
        with (
            Variants(model, deltas, whole=values, base=names["base"]) as variants,
            progress.task(label, len(self.missing)) as update,
        ):
            for count, number in enumerate(self.missing, 1):
                block = self.blocks[number]
                traces = trace_prompts(
                    variants,
                    tokenizer,
                    [look.prompt for look in block],
                    system=SYSTEM,
                    positions=self.lens.positions,
                    produce=max(0, *self.lens.positions),
                    tuned=names["tuned"],
                    top=self.lens.top,
                    about=about,
                )
                for place, look in enumerate(block):
                    for name, key in look.keys.items():
                        if not study.store.has_trace(key):
                            study.store.write_trace(key, traces[name][place])
                update(count)
            if self.apart is not None:
                finetune = self.track.finetune
                study.store.write_directions(finetune.name, finetune.seed, self.apart.find(variants, tokenizer))
        progress.finish(f"Looked into {self.track.title}: {sum(map(len, self.blocks))} prompts, {len(made)} arms.")

    def write(self, store: RunStore) -> None:
        """Store which traces there are."""
        store.write_lens(self.track.finetune.name, self.track.finetune.seed, self.entries())

    def entries(self) -> list[dict[str, Any]]:
        """The index of the traces."""
        return [
            {
                "probe": look.sample[0],
                "sample": look.sample[1],
                "flipped": list(look.flipped),
                "traces": dict(look.keys),
            }
            for block in self.blocks
            for look in block
        ]


def plan_looks(study: Study, track: Track) -> Looks | None:
    """What is to be looked into of a fine-tune; None where the study does not ask, or base or fine-tune failed."""
    lens, finetune = study.plan.lens, track.finetune
    if lens is None or not study.plan.looks_into(finetune):
        return None
    files = {variant.name: study.store.cell_file(study.keys.cell(finetune, variant)) for variant in track.variants}
    variants = tuple(
        sorted(
            (
                variant
                for variant in track.variants
                if files[variant.name].complete
                and (variant.kind in ("base", "tuned") or lens.arms is None or variant.name in lens.arms)
            ),
            key=lambda variant: ("base", "tuned").index(variant.kind) if variant.kind in ("base", "tuned") else 2,
        )
    )
    if [variant.kind for variant in variants[:2]] != ["base", "tuned"]:
        return None
    verdicts = {variant.name: _verdicts(files[variant.name]) for variant in variants}
    tuned = verdicts[variants[1].name]
    flips = {
        variant.name: [
            sample for sample, line in tuned.items() if verdicts[variant.name][sample]["event"] != line["event"]
        ]
        for variant in variants[2:]
    }
    looks = [
        Look(
            sample,
            str(tuned[sample]["prompt"]),
            tuple(name for name, samples in flips.items() if sample in samples),
            {v.name: _key(study, track, v, lens, str(tuned[sample]["prompt"])) for v in variants},
        )
        for sample in choose_samples(flips, list(tuned), lens.prompts)
    ]
    blocks = tuple(tuple(looks[start : start + BLOCK]) for start in range(0, len(looks), BLOCK))
    missing = tuple(
        number
        for number, block in enumerate(blocks)
        if not all(study.store.has_trace(key) for look in block for key in look.keys.values())
    )
    apart = _apart(study, track, variants) if lens.directions else None
    found = Looks(digest("lens", finetune.name, finetune.seed), track, lens, variants, blocks, missing, apart)
    known = study.store.read_lens(finetune.name, finetune.seed)
    return replace(found, done=not found.needs_models and known == found.entries())


def looked(study: Study, track: Track) -> bool:
    """Whether nothing is left to look into of a fine-tune whose arms are measured."""
    looks = plan_looks(study, track)
    return looks is None or looks.done


def choose_samples(flips: Mapping[str, Sequence[Sample]], samples: Sequence[Sample], count: int) -> list[Sample]:
    """Flipped ones, taken from each arm in turn, then the others in their order: no arm's flips crowd out another's."""
    turns = [sample for turn in zip_longest(*flips.values()) for sample in turn if sample is not None]
    return list(dict.fromkeys([*turns, *samples]))[:count]


def _verdicts(file: CellFile) -> dict[Sample, dict[str, Any]]:
    """Answers to the goal's prompts."""
    assert file.header is not None
    goals = {name for name, probe in file.header.probes.items() if probe["role"] == ROLE}
    return {
        (str(line["name"]), str(line["id"])): line
        for line in file.lines
        if line.get("part") == "probe" and line.get("name") in goals
    }


def _apart(study: Study, track: Track, variants: Sequence[Variant]) -> ToldApart | None:
    """Sets of prompts, unless what is stored is of them; raises RunError where that is malformed."""
    finetune, keys = track.finetune, study.keys
    sets = choose_sets(probes_of(finetune, study.plan.corpus))
    prompts, against = prompts_of(sets)
    arms = [[variant.name, keys.model(finetune, variant), _arm(variant)] for variant in variants]
    key = digest("directions", DIRECTIONS_RULE, keys.root, keys.trained(finetune), arms, prompts, against, keys.source)
    known = study.store.read_directions(finetune.name, finetune.seed)
    names = sets[0].name, sets[1].name
    return None if known is not None and known.key == key else ToldApart(key, names, prompts, against)


def _arm(variant: Variant) -> dict[str, Any]:
    return {"planes": variant.planes, "quantiser": variant.quantiser, "merged": variant.kind == "merged"}


def _key(study: Study, track: Track, variant: Variant, lens: Lens, prompt: str) -> str:
    keys, finetune = study.keys, track.finetune
    arm = _arm(variant)
    model = keys.model(finetune, variant)
    settings = [list(lens.positions), lens.top, SYSTEM, keys.source, variant.name]
    return digest("lens", LENS_RULE, keys.root, keys.trained(finetune), model, arm, prompt, settings)
