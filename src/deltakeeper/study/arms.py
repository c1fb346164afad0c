"""The arms of a study on one live base model: put a variant's change on, ask all probes, take it off again.

Compressed deltas run unmerged (`deltakeeper.attach`); only the row that asks what merging does runs merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltakeeper.apply import iterate_changes, iterate_merged
from deltakeeper.artifact import DeltaArtifact
from deltakeeper.attach import Change, attached
from deltakeeper.checkpoint import Checkpoint
from deltakeeper.evals.judges import KeywordJudge
from deltakeeper.evals.perplexity import passage_nll
from deltakeeper.evals.probes import Probe, run_probe
from deltakeeper.lab.corpus import SYSTEM, Corpus
from deltakeeper.lab.embedded import load_model
from deltakeeper.lab.quantise import FullModelRTN
from deltakeeper.study import cells
from deltakeeper.study.variants import Variant

PASSAGES = 12


@dataclass(frozen=True)
class Measured:
    """What one arm said."""

    probes: dict[str, cells.Probe]
    perplexity: cells.Perplexity


class Arms:
    """A live base in bfloat16 that takes every variant in turn."""

    def __init__(self, origin: Checkpoint, corpus: Corpus, judge: KeywordJudge) -> None:
        self.origin = origin
        self.corpus = corpus
        self.judge = judge
        self.quantised_bytes: int | None = None
        self._loaded: tuple[Any, Any] | None = None
        self._base_answers: dict[Probe, cells.Probe] = {}
        self._base_perplexity: cells.Perplexity | None = None

    def evaluate(
        self, variant: Variant, probes: Sequence[Probe], tuned: Checkpoint, delta: DeltaArtifact | None
    ) -> Measured:
        """Ask all probes of one variant; the base's answers are asked once and shared between attacks."""
        model, tokenizer = self._model()
        with torch.inference_mode(), attached(model, self._changes(variant, tuned, delta)):
            if variant.kind == "base":
                for probe in probes:
                    if probe not in self._base_answers:
                        self._base_answers[probe] = self._ask(model, tokenizer, probe)
                self._base_perplexity = self._base_perplexity or self._read(model, tokenizer)
                return Measured({p.name: self._base_answers[p] for p in probes}, self._base_perplexity)
            asked = {p.name: self._ask(model, tokenizer, p) for p in probes}
            return Measured(asked, self._read(model, tokenizer))

    def _model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = load_model(self.origin.path, torch.bfloat16)
        return self._loaded

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

    def _ask(self, model: Any, tokenizer: Any, probe: Probe) -> cells.Probe:
        answers = run_probe(model, tokenizer, probe, self.judge, system=SYSTEM)
        return cells.Probe(probe.title, probe.role, probe.event, tuple(cells.Answer(**a) for a in answers))

    def _read(self, model: Any, tokenizer: Any) -> cells.Perplexity:
        texts = [row.prompt for row in self.corpus.passages[:PASSAGES]]
        nll, tokens = passage_nll(model, tokenizer, texts)
        return cells.Perplexity(tuple(nll), tuple(tokens))
