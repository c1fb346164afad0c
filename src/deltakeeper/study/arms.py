"""The arms of a study on one live base model: serve some of them, ask, leave the base as it was.

A compressed delta is a tenant of the serving engine, so what is measured is what would be served: every product is
base and delta summed in float32 and rounded once. All compressed deltas of a fine-tune, and the base, share one engine
and one batch. Variants that stand for whole weights (the fine-tune, a merge into bfloat16, a quantised model) are asked
through the same engine one after the other, with their values in place of the base's.

`DELTAKEEPER_ANSWERS=transformers` computes everything with transformers alone and deltas beside the weights
(`deltakeeper.attach`), which is what the engine is held against. The two round differently (attention, and where an
activation is rounded), so a greedy answer may differ between them where two tokens are nearly equally likely. The
engine's products are made for CPUs: where there is a GPU, transformers answers on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch

from deltakeeper.apply import iterate_changes, iterate_merged
from deltakeeper.artifact import DeltaArtifact
from deltakeeper.attach import Change, attached
from deltakeeper.checkpoint import Checkpoint, open_checkpoint
from deltakeeper.devices import working_device
from deltakeeper.engine.tenant_files import open_checked
from deltakeeper.errors import RunError
from deltakeeper.evals.answerer import LoadedModel
from deltakeeper.evals.utility import ModelScorer, Scorer
from deltakeeper.fingerprint import fingerprint
from deltakeeper.lab.embedded import load_model
from deltakeeper.study.served import ServedModels, Tenant, served_together
from deltakeeper.study.variants import Variant, parse_quantiser

VARIABLE = "DELTAKEEPER_ANSWERS"
Source = Literal["engine", "transformers"]


@dataclass
class Arm:
    """A variant that is ready to be asked.

    Attributes:
        variant: what it is.
        artifact: its compressed delta, for kinds that have one.
        weights: folder of the whole weights that answer, for kinds that have no delta and are not the base.
        nbytes: bytes that are stored, None where nothing is; a quantised model's are known once it is asked.
    """

    variant: Variant
    artifact: DeltaArtifact | None = None
    weights: Path | None = None
    nbytes: int | None = None


class Panel(Protocol):
    """Several arms, asked the same things; one entry an arm, in their order."""

    def answers(self, prompts: Sequence[str], *, max_new_tokens: int, system: str | None = None) -> list[list[str]]:
        """Answers of every arm, each as by `Answerer.answer`."""

    def nlls(self, texts: Sequence[str]) -> list[tuple[list[float], list[int]]]:
        """Likelihoods of every arm, each as by `Answerer.nll`."""

    def scorer(self) -> Scorer:
        """The arms for benchmarks, in their order."""


class OnePanel:
    """A single model as a panel."""

    def __init__(self, answerer: LoadedModel) -> None:
        self.answerer = answerer

    def answers(self, prompts: Sequence[str], *, max_new_tokens: int, system: str | None = None) -> list[list[str]]:
        """See `Panel.answers`."""
        return [self.answerer.answer(prompts, max_new_tokens=max_new_tokens, system=system)]

    def nlls(self, texts: Sequence[str]) -> list[tuple[list[float], list[int]]]:
        """See `Panel.nlls`."""
        return [self.answerer.nll(texts)]

    def scorer(self) -> Scorer:
        """See `Panel.scorer`."""
        return ModelScorer(self.answerer.model, self.answerer.tokenizer)


class Arms:
    """A live base in bfloat16 that serves variants, together or in turn."""

    def __init__(self, origin: Checkpoint, source: Source | None = None, root: str | None = None) -> None:
        """Prepare the arms; nothing is loaded yet.

        Args:
            origin: the base.
            source: what computes the answers; what `DELTAKEEPER_ANSWERS` says, or the engine, by default.
            root: the base's fingerprint, where it is known already.

        Raises:
            RunError: the environment names another source.
        """
        self.origin = origin
        self.source = source or chosen_source()
        self._loaded: tuple[Any, Any] | None = None
        self._root = root

    @property
    def root(self) -> str:
        """Fingerprint of the base."""
        if self._root is None:
            self._root = fingerprint(self.origin).root
        return self._root

    def waves(self, arms: Sequence[Arm], tenants: int) -> list[list[Arm]]:
        """Arms that are asked together: up to `tenants` that share the base, then each of the others alone."""
        if self.source == "transformers":
            return [[arm] for arm in arms]
        shared = [arm for arm in arms if arm.variant.is_tenant]
        alone = [[arm] for arm in arms if not arm.variant.is_tenant]
        return [shared[i : i + tenants] for i in range(0, len(shared), tenants)] + alone

    @contextmanager
    def asked(self, arms: Sequence[Arm]) -> Iterator[Panel]:
        """A panel of the arms of one wave for the length of a `with` block.

        Raises:
            OverlayError: a delta does not fit the base.
            BaseMismatchError: a delta was made from another base.
        """
        model, tokenizer = self.live()
        if self.source == "transformers":
            (arm,) = arms
            with torch.inference_mode(), attached(model, self.changes(arm)):
                yield OnePanel(LoadedModel(model, tokenizer, batch_size=64 if model.device.type == "cpu" else 512))
        elif all(arm.variant.is_tenant for arm in arms):
            names = [None if arm.artifact is None else f"arm-{i}" for i, arm in enumerate(arms)]
            tenants = {
                name: Tenant(open_checked(arm.artifact.path, self.root), arm.variant.planes)
                for name, arm in zip(names, arms, strict=True)
                if name is not None and arm.artifact is not None
            }
            with served_together(model, tokenizer, tenants) as engine:
                yield ServedModels(engine, tokenizer, names)
        else:
            (arm,) = arms
            # An engine of its own: what another one has cached belongs to other weights.
            with attached(model, self.changes(arm)), served_together(model, tokenizer, {}) as engine:
                yield ServedModels(engine, tokenizer, (None,))

    def live(self) -> tuple[Any, Any]:
        """The base in memory and its tokenizer."""
        if self._loaded is None:
            device = working_device() if self.source == "transformers" else None
            self._loaded = load_model(self.origin.path, torch.bfloat16, device)
        return self._loaded

    def changes(self, arm: Arm) -> Iterator[Change]:
        """What an arm changes in the base, for whoever asks it with values of its own in place of the base's."""
        kind, delta = arm.variant.kind, arm.artifact
        if kind == "merged" and delta is not None:
            yield from (Change(name, "value", value) for name, value in iterate_merged(self.origin, delta))
        elif delta is not None:
            if arm.variant.planes is not None:
                raise RunError(f"'{arm.variant.name}' serves a part of its planes, which only the engine can do.")
            yield from iterate_changes(self.origin, delta)
        elif arm.weights is not None:
            with open_checkpoint(arm.weights) as tuned:
                if arm.variant.quantiser is None:
                    yield from (Change(name, "value", tuned.read(name)) for name in tuned.tensors)
                    return
                rtn = parse_quantiser(arm.variant.quantiser)
                for name, value in rtn.quantise((name, tuned.read(name)) for name in tuned.tensors):
                    yield Change(name, "value", value)
                arm.nbytes = rtn.nbytes


def chosen_source() -> Source:
    """What should compute the answers: what the environment says, else the engine, or transformers on a GPU.

    Raises:
        RunError: the environment says a word that is not known.
    """
    wanted = os.environ.get(VARIABLE) or ("engine" if working_device().type == "cpu" else "transformers")
    for source in get_args(Source):
        if wanted == source:
            return source  # type: ignore[no-any-return]
    raise RunError(f"{VARIABLE} is {wanted!r}; set it to engine or transformers.")
