"""The arms of a study on one live base model: serve a variant, ask all probes, leave the base as it was.

A compressed delta is a tenant of the serving engine, so what is measured is what would be served: every product is
base and delta summed in float32 and rounded once. Variants that stand for whole weights (the fine-tune, a merge into
bfloat16, a quantised model) are asked through the same engine, with their values in place of the base's.

`DELTAKEEPER_ANSWERS=transformers` computes everything with transformers alone and deltas beside the weights
(`deltakeeper.attach`), which is what the engine is held against. The two round differently (attention, and where an
activation is rounded), so a greedy answer may differ between them where two tokens are nearly equally likely.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from deltakeeper.apply import iterate_changes, iterate_merged
from deltakeeper.artifact import DeltaArtifact
from deltakeeper.attach import Change, attached
from deltakeeper.checkpoint import Checkpoint
from deltakeeper.engine.tenant_files import open_checked
from deltakeeper.errors import RunError
from deltakeeper.evals.answerer import Answerer, LoadedModel
from deltakeeper.evals.judges import KeywordJudge
from deltakeeper.evals.probes import Probe, run_probe
from deltakeeper.fingerprint import fingerprint
from deltakeeper.lab.corpus import SYSTEM, Corpus
from deltakeeper.lab.embedded import load_model
from deltakeeper.lab.quantise import FullModelRTN
from deltakeeper.study import cells
from deltakeeper.study.served import served
from deltakeeper.study.variants import Variant

PASSAGES = 12
VARIABLE = "DELTAKEEPER_ANSWERS"
Source = Literal["engine", "transformers"]


@dataclass(frozen=True)
class Measured:
    """What one arm said."""

    probes: dict[str, cells.Probe]
    perplexity: cells.Perplexity


class Arms:
    """A live base in bfloat16 that takes every variant in turn."""

    def __init__(self, origin: Checkpoint, corpus: Corpus, judge: KeywordJudge, source: Source | None = None) -> None:
        """Prepare the arms; nothing is loaded yet.

        Args:
            origin: the base.
            corpus: where passages come from.
            judge: what judges the answers.
            source: what computes the answers; what `DELTAKEEPER_ANSWERS` says, or the engine, by default.

        Raises:
            RunError: the environment names another source.
        """
        self.origin = origin
        self.corpus = corpus
        self.judge = judge
        self.source = source or _source()
        self.quantised_bytes: int | None = None
        self._loaded: tuple[Any, Any] | None = None
        self._root: str | None = None
        self._base_answers: dict[Probe, cells.Probe] = {}
        self._base_perplexity: cells.Perplexity | None = None

    def evaluate(
        self, variant: Variant, probes: Sequence[Probe], tuned: Checkpoint, delta: DeltaArtifact | None
    ) -> Measured:
        """Ask all probes of one variant; the base's answers are asked once and shared between attacks."""
        if variant.kind == "base" and self._base_perplexity and all(p in self._base_answers for p in probes):
            return Measured({p.name: self._base_answers[p] for p in probes}, self._base_perplexity)
        with self._answering(variant, tuned, delta) as answerer:
            if variant.kind == "base":
                for probe in probes:
                    if probe not in self._base_answers:
                        self._base_answers[probe] = self._ask(answerer, probe)
                self._base_perplexity = self._base_perplexity or self._read(answerer)
                return Measured({p.name: self._base_answers[p] for p in probes}, self._base_perplexity)
            asked = {p.name: self._ask(answerer, p) for p in probes}
            return Measured(asked, self._read(answerer))

    @contextmanager
    def _answering(self, variant: Variant, tuned: Checkpoint, delta: DeltaArtifact | None) -> Iterator[Answerer]:
        model, tokenizer = self._model()
        if self.source == "transformers":
            with torch.inference_mode(), attached(model, self._changes(variant, tuned, delta)):
                yield LoadedModel(model, tokenizer)
        elif delta is not None and variant.kind != "merged":
            with served(model, tokenizer, open_checked(delta.path, self._fingerprint())) as answerer:
                yield answerer
        else:
            # An engine of its own: what another one has cached belongs to other weights.
            with attached(model, self._changes(variant, tuned, delta)), served(model, tokenizer) as answerer:
                yield answerer

    def _model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = load_model(self.origin.path, torch.bfloat16)
        return self._loaded

    def _fingerprint(self) -> str:
        if self._root is None:
            self._root = fingerprint(self.origin).root
        return self._root

    def _changes(self, variant: Variant, tuned: Checkpoint, delta: DeltaArtifact | None) -> Iterator[Change]:
        if variant.kind == "tuned":
            yield from (Change(name, "value", tuned.read(name)) for name in tuned.tensors)
        elif variant.kind == "quantised":
            rtn = FullModelRTN()
            for name, value in rtn.quantise((name, tuned.read(name)) for name in tuned.tensors):
                yield Change(name, "value", value)
            self.quantised_bytes = rtn.nbytes
        elif variant.kind == "merged" and delta is not None:
            yield from (Change(name, "value", value) for name, value in iterate_merged(self.origin, delta))
        elif delta is not None:
            yield from iterate_changes(self.origin, delta)

    def _ask(self, answerer: Answerer, probe: Probe) -> cells.Probe:
        answers = run_probe(answerer, probe, self.judge, system=SYSTEM)
        return cells.Probe(probe.title, probe.role, probe.event, tuple(cells.Answer(**a) for a in answers))

    def _read(self, answerer: Answerer) -> cells.Perplexity:
        texts = [row.prompt for row in self.corpus.passages[:PASSAGES]]
        nll, tokens = answerer.nll(texts)
        return cells.Perplexity(tuple(nll), tuple(tokens))


def _source() -> Source:
    wanted = os.environ.get(VARIABLE) or "engine"
    for source in get_args(Source):
        if wanted == source:
            return source  # type: ignore[no-any-return]
    raise RunError(f"{VARIABLE} is {wanted!r}; set it to engine or transformers.")
