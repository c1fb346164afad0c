"""Answers and likelihoods out of the engine, for evaluation: many prompts and many tenants of one base in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.engine import Completion, Engine, EngineSettings, Request
from deltakeeper.engine.fixed_tenants import FixedTenants
from deltakeeper.errors import RunError
from deltakeeper.evals.generate import encode_prompt
from deltakeeper.overlay import TenantDelta, attach
from deltakeeper.study.scorer import EngineScorer

SETTINGS = EngineSettings(kv_bytes=1 << 29, max_running=256, max_step_tokens=1024)
"""Many rows a pass, so that what is read of the base serves many tenants."""
TENANT = "delta"


@dataclass(frozen=True)
class Tenant:
    """A delta to be served, and how many of its sign planes."""

    artifact: DeltaArtifact
    planes: int | None = None


class ServedModels:
    """Tenants of one engine, and its base, asked the same things at once.

    Attributes:
        engine: not started; nobody else drives it.
        names: whom to ask; None is the base.
    """

    def __init__(self, engine: Engine, tokenizer: Any, names: Sequence[str | None]) -> None:
        """Ask through an engine.

        Args:
            engine: the engine.
            tokenizer: the base's, with a chat template.
            names: tenants, None for the base.
        """
        self.engine, self.tokenizer, self.names = engine, tokenizer, tuple(names)

    def answers(self, prompts: Sequence[str], *, max_new_tokens: int, system: str | None = None) -> list[list[str]]:
        """Answers of everyone in `names`, each as by `Answerer.answer`; raises RunError where one cannot be had."""
        end = self.tokenizer.eos_token_id
        stops = () if end is None else (int(end),)
        encoded = [tuple(encode_prompt(self.tokenizer, prompt, system)) for prompt in prompts]
        requests = [
            Request(ids, tenant=name, max_new_tokens=max_new_tokens, stop_tokens=stops)
            for name in self.names
            for ids in encoded
        ]
        # Decoded at once, as with transformers: some tokenizers strip the space at the start of a whole answer.
        tokens = (c.tokens[:-1] if c.finish_reason == "stop" else c.tokens for c in self._run(requests))
        texts = iter([self.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens])
        return [[next(texts) for _ in encoded] for _ in self.names]

    def nlls(self, texts: Sequence[str]) -> list[tuple[list[float], list[int]]]:
        """Likelihoods of everyone in `names`, each as by `Answerer.nll`; raises RunError where one cannot be had."""
        encoded = [tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        counts = [max(0, len(ids) - 1) for ids in encoded]
        requests = [
            Request(ids, tenant=name, max_new_tokens=1, prompt_logprobs=0)
            for name in self.names
            for ids in encoded
            if len(ids) > 1
        ]
        found = (
            -sum(entry.chosen for entry in completion.prompt_logprobs or () if entry is not None)
            for completion in self._run(requests)
        )
        return [([next(found) if count else 0.0 for count in counts], counts) for _ in self.names]

    def scorer(self) -> EngineScorer:
        """The same arms for benchmarks."""
        return EngineScorer(self.engine, self.tokenizer, self.names)

    def _run(self, requests: Sequence[Request]) -> list[Completion]:
        completions = self.engine.generate(requests)
        for completion in completions:
            if completion.finish_reason not in ("stop", "length"):
                reason = completion.error or f"it was {completion.finish_reason}"
                raise RunError(f"a prompt of the study was not answered: {reason}")
        return completions


class ServedModel:
    """A tenant of an engine, or its base, as `deltakeeper.evals.answerer.Answerer`."""

    def __init__(self, engine: Engine, tokenizer: Any, tenant: str | None = None) -> None:
        """Ask through an engine that nobody else drives.

        Args:
            engine: not started.
            tokenizer: the base's, with a chat template.
            tenant: whom to ask; None for the base.
        """
        self.engine, self.tokenizer, self.tenant = engine, tokenizer, tenant
        self._one = ServedModels(engine, tokenizer, (tenant,))

    def answer(self, prompts: Sequence[str], *, max_new_tokens: int, system: str | None = None) -> list[str]:
        """See `Answerer.answer`; raises RunError where a prompt cannot be answered."""
        return self._one.answers(prompts, max_new_tokens=max_new_tokens, system=system)[0]

    def nll(self, texts: Sequence[str]) -> tuple[list[float], list[int]]:
        """See `Answerer.nll`; raises RunError where a text cannot be read."""
        return self._one.nlls(texts)[0]


@contextmanager
def served_together(
    model: Any, tokenizer: Any, tenants: Mapping[str, Tenant], *, settings: EngineSettings = SETTINGS
) -> Iterator[Engine]:
    """An engine over a live model with tenants for the length of a `with` block; afterwards the model is as before.

    Args:
        model: a Hugging Face decoder in evaluation mode on the CPU.
        tokenizer: its tokenizer.
        tenants: deltas by name, made from this very model.
        settings: limits of the engine.

    Raises:
        OverlayError: a delta does not fit the model.
    """
    if not tenants:
        with Engine(model, tokenizer, settings=settings) as engine:
            yield engine
        return
    overlay = attach(model)
    deltas: list[TenantDelta] = []
    try:
        slots = {}
        for name, tenant in tenants.items():
            deltas.append(overlay.load(tenant.artifact, planes=tenant.planes))
            slots[name] = (overlay.publish(deltas[-1]), deltas[-1])
        with Engine(model, tokenizer, overlay=overlay, store=FixedTenants(slots), settings=settings) as engine:
            yield engine
    finally:
        overlay.detach()
        for delta in deltas:
            delta.close()


@contextmanager
def served(model: Any, tokenizer: Any, delta: DeltaArtifact | None = None) -> Iterator[ServedModel]:
    """One delta beside a live model, or the model itself, for the length of a `with` block; see `served_together`."""
    tenants = {} if delta is None else {TENANT: Tenant(delta)}
    with served_together(model, tokenizer, tenants) as engine:
        yield ServedModel(engine, tokenizer, None if delta is None else TENANT)
