"""Answers and likelihoods out of the engine, for evaluation: 32 prompts at a time, equal beginnings computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.engine import Completion, Engine, EngineSettings, Request
from deltakeeper.errors import RunError
from deltakeeper.evals.generate import encode_prompt
from deltakeeper.tenancy import published

SETTINGS = EngineSettings(kv_bytes=1 << 29, max_running=32)
TENANT = "delta"


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

    def answer(self, prompts: Sequence[str], *, max_new_tokens: int, system: str | None = None) -> list[str]:
        """See `Answerer.answer`; raises RunError where a prompt cannot be answered."""
        end = self.tokenizer.eos_token_id
        stops = () if end is None else (int(end),)
        requests = [
            Request(
                tuple(encode_prompt(self.tokenizer, prompt, system)),
                tenant=self.tenant,
                max_new_tokens=max_new_tokens,
                stop_tokens=stops,
            )
            for prompt in prompts
        ]
        # Decoded at once, as with transformers: some tokenizers strip the space at the start of a whole answer.
        tokens = (c.tokens[:-1] if c.finish_reason == "stop" else c.tokens for c in self._run(requests))
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]

    def nll(self, texts: Sequence[str]) -> tuple[list[float], list[int]]:
        """See `Answerer.nll`; raises RunError where a text cannot be read."""
        encoded = [tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        counts = [max(0, len(ids) - 1) for ids in encoded]
        requests = [
            Request(ids, tenant=self.tenant, max_new_tokens=1, prompt_logprobs=0) for ids in encoded if len(ids) > 1
        ]
        found = (
            -sum(entry.chosen for entry in completion.prompt_logprobs or () if entry is not None)
            for completion in self._run(requests)
        )
        return [next(found) if count else 0.0 for count in counts], counts

    def _run(self, requests: Sequence[Request]) -> list[Completion]:
        completions = self.engine.generate(requests)
        for completion in completions:
            if completion.finish_reason not in ("stop", "length"):
                reason = completion.error or f"it was {completion.finish_reason}"
                raise RunError(f"a prompt of the study was not answered: {reason}")
        return completions


@contextmanager
def served(model: Any, tokenizer: Any, delta: DeltaArtifact | None = None) -> Iterator[ServedModel]:
    """An engine over a live model for the length of a `with` block; afterwards the model is as before.

    Args:
        model: a Hugging Face decoder in evaluation mode on the CPU.
        tokenizer: its tokenizer.
        delta: what to serve beside it, made from this very model; the model itself is asked by default.

    Raises:
        OverlayError: the delta does not fit the model.
    """
    artifacts = {} if delta is None else {TENANT: delta}
    with published(model, artifacts) if artifacts else nullcontext() as tenancy:
        overlay = None if tenancy is None else tenancy.overlay
        store = None if tenancy is None else tenancy.tenants
        with Engine(model, tokenizer, overlay=overlay, store=store, settings=SETTINGS) as engine:
            yield ServedModel(engine, tokenizer, None if delta is None else TENANT)
