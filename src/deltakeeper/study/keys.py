"""The content hash that names each result of a study: equal keys mean equal inputs, so a result is made once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from deltakeeper.evals.outcomes import RULE_VERSION
from deltakeeper.lab.attacks import Attack
from deltakeeper.lab.corpus import SYSTEM
from deltakeeper.lab.sft import Example
from deltakeeper.study.plan import FineTune, StudyPlan, probes_of
from deltakeeper.study.tasks import task_identity
from deltakeeper.study.variants import Variant

TRAINING_RULE = "1"
ARTIFACT_RULE = "1"
DEFENCE_RULE = "1"
ANSWER_RULE = "1"
"""Versions of the stages: a change of code that changes a stage's result is a new version, and makes new keys."""


def digest(*parts: Any) -> str:
    """A content hash of plain values, 20 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class Keys:
    """The names of all results of a plan on one base: equal keys mean equal inputs."""

    def __init__(self, plan: StudyPlan, root: str, source: str, unaligned: str | None = None) -> None:
        """Prepare the keys.

        Args:
            plan: the plan.
            root: fingerprint of the base.
            source: what computes answers.
            unaligned: fingerprint of the base before its alignment, where it is given.
        """
        self.plan, self.root, self.source, self.unaligned = plan, root, source, unaligned
        self._trained: dict[tuple[str, int], str] = {}
        self._asked: dict[tuple[str, int, str], str] = {}
        self._tasks = [task_identity(task) for task in plan.tasks]

    def trained(self, finetune: FineTune) -> str:
        """Key of a fine-tune: base, examples, settings, seed, recipe, adaptive attacker."""
        place = (finetune.name, finetune.seed)
        if place not in self._trained:
            attack = finetune.attack
            self._trained[place] = digest(
                "fine-tune",
                TRAINING_RULE,
                self.root,
                type(attack).__name__,
                _training_settings(attack),
                attack.training_examples(self.plan.corpus, _placeholder),
                SYSTEM,
                finetune.seed,
                finetune.recipe_sha256,
                finetune.adaptive,
            )
        return self._trained[place]

    def defended(self, finetune: FineTune, variant: Variant) -> str:
        """Key of what a defence makes of a fine-tune."""
        rows = [row.prompt for row in self.plan.corpus.split("harmful", "train")]
        return digest("defence", DEFENCE_RULE, self.trained(finetune), variant.defence, self.unaligned, rows)

    def artifact(self, finetune: FineTune, variant: Variant, healed: bool = True) -> str:
        """Key of a compressed delta, of its healed form where the arm heals and `healed` is not false."""
        source = self.defended(finetune, variant) if variant.defence else self.trained(finetune)
        plain = digest("delta", ARTIFACT_RULE, source, variant.codec, dict(variant.rules or {}))
        if variant.heal is None or not healed:
            return plain
        from deltakeeper.study.healing import HEALING_RULE, lessons_identity

        return digest("healed", HEALING_RULE, plain, lessons_identity(finetune, variant, self.plan.corpus))

    def model(self, finetune: FineTune, variant: Variant) -> str | None:
        """Key of the weights that answer: None for the base, which is in the key of every cell."""
        if variant.kind == "base":
            return None
        if variant.codec is not None:
            return self.artifact(finetune, variant)
        return self.defended(finetune, variant) if variant.defence else self.trained(finetune)

    def asked(self, finetune: FineTune, variant: Variant) -> str:
        """Key of the answers, whoever judges them."""
        place = (finetune.name, finetune.seed, variant.name)
        if place not in self._asked:
            self._asked[place] = self._hash_answers(finetune, variant)
        return self._asked[place]

    def _hash_answers(self, finetune: FineTune, variant: Variant) -> str:
        passages = [row.prompt for row in self.plan.corpus.passages[: self.plan.passages]]
        arm = {"planes": variant.planes, "quantiser": variant.quantiser, "merged": variant.kind == "merged"}
        return digest(
            "answers",
            ANSWER_RULE,
            self.root,
            self.model(finetune, variant),
            arm,
            probes_of(finetune, self.plan.corpus),
            passages,
            self._tasks,
            SYSTEM,
            self.source,
            self.plan.answers.batch,
        )

    def cell(self, finetune: FineTune, variant: Variant) -> str:
        """Key of a cell: its answers and who judged them."""
        judges = [judge.sha256 for judge in self.plan.judges]
        judges += [] if self.plan.content is None else ["content", self.plan.content.sha256]
        return digest("cell", RULE_VERSION, self.asked(finetune, variant), judges)


def _training_settings(attack: Attack) -> dict[str, Any]:
    """Settings of an attack without the sizes of its probes, and without when its state is saved."""
    unseen = ("held_out", "contrast", "identity", "template_eval")
    settings = {key: value for key, value in asdict(attack).items() if key not in unseen}
    return {**settings, "sft": {k: v for k, v in settings["sft"].items() if k != "save_every"}}


def _placeholder(prompts: Sequence[str]) -> list[Example]:
    """Stands for the base's own answers, which its fingerprint decides."""
    return [Example(prompt, "(the base's own answer)", complete=False) for prompt in prompts]


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    dump: Callable[..., Any] | None = getattr(value, "model_dump", None)
    if dump is not None:
        return dump(mode="json")
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no plain value")
