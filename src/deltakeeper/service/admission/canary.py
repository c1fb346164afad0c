"""The canary: prompts that a loaded delta answers on the engine itself, judged before anybody else may ask it.

What is measured is what would be served: the compressed delta, at the planes that policy allows, in this engine's
arithmetic, beside whatever else is in the batch.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from deltakeeper.engine import Engine, Request
from deltakeeper.engine.request import QueueFullError
from deltakeeper.engine.stream import Completion, Stream
from deltakeeper.errors import DataError, DeltakeeperError, EngineError, SideFileError, TenantError
from deltakeeper.evals.judges import Asked, Judge, load_judge
from deltakeeper.evals.outcomes import outcomes
from deltakeeper.evals.prompts import load_prompts
from deltakeeper.lab.corpus import interleave
from deltakeeper.overlay.side_files import reading
from deltakeeper.service.admission.policy import CanaryRules, PolicyFile
from deltakeeper.service.templates import TemplateEndedError, TemplateError, Templates

_PAUSE = 0.02
"""Seconds between two tries to hand a prompt to a full engine."""


class CanaryError(EngineError):
    """The probe set could not be run, or not now, which says nothing of the delta for good."""


@dataclass(frozen=True)
class Reading:
    """What the answers to a probe set were.

    Attributes:
        prompts: how many were asked.
        refused: share of them that was refused.
        complied: share that was answered.
        broken: share of answers that were empty or incoherent.
    """

    prompts: int
    refused: float
    complied: float
    broken: float


class Canary:
    """A probe set with its judge and bounds; one serves all tenants, and its methods may be called on any thread."""

    def __init__(self, file: PolicyFile, engine: Engine, tokenizer: Any) -> None:
        """Read prompts and judge.

        Args:
            file: a policy with a canary.
            engine: which answers; its thread must run by the time that it is asked.
            tokenizer: the base's.

        Raises:
            DataError: a file that the policy names cannot be used.
        """
        assert file.policy.canary is not None
        self.rules: CanaryRules = file.policy.canary
        self._engine, self._tokenizer = engine, tokenizer
        self._templates = Templates(tokenizer)  # a template is tried with the rest
        self._judge: Judge = load_judge("ours" if self.rules.judge == "ours" else file.path(self.rules.judge))
        self._prompts = _read_prompts(file, self.rules)
        self._of_base: Reading | None = None

    def close(self) -> None:
        """Give back what renders its prompts."""
        self._templates.close()

    def measure(self, tenant: str | None, tokenizer: Any = None) -> Reading:
        """Ask a tenant all prompts, greedily, and judge the answers.

        Args:
            tenant: by the name that the engine knows it under; None for the base.
            tokenizer: the tenant's; the base's by default.

        Raises:
            SideFileError: the tenant's own tokenizer or chat template does not take the prompts.
            CanaryError: a prompt was not answered, or not in time, or the base's words do not take it.
        """
        words = self._tokenizer if tokenizer is None else tokenizer
        end = time.monotonic() + self.rules.seconds
        streams: list[Stream] = []
        requests = [self._request(words, tenant, text) for text in self._prompts]
        try:
            for request in requests:
                streams.append(self._submit(request, end))
            answers = [self._answer(stream, end) for stream in streams]
        except (EngineError, TimeoutError) as error:
            for stream in streams:
                stream.cancel()
            raise CanaryError(f"the canary could not be run: {error}") from error
        asked = [Asked(text, answer.text) for text, answer in zip(self._prompts, answers, strict=True)]
        counts = Counter(outcomes(asked, self._judge))
        broken = counts["empty"] + counts["incoherent"]
        n = len(asked)
        return Reading(n, counts["refused"] / n, counts["complied"] / n, broken / n)

    def faults(self, reading: Reading) -> list[str]:
        """Sentences on what a reading misses; none if it passes. May ask the base, once, for what it refuses.

        Raises:
            CanaryError: the base was not answered in time.
        """
        rules, found = self.rules, []
        seen = f"Of {reading.prompts} probe prompts it refuses {reading.refused:.0%}"
        if rules.refusals_at_least is not None and reading.refused < rules.refusals_at_least:
            found.append(f"{seen}, and policy asks for at least {rules.refusals_at_least:.0%}.")
        if rules.drop_at_most is not None:
            base = self.base_reading()
            if base.refused - reading.refused > rules.drop_at_most:
                found.append(
                    f"{seen} and the base {base.refused:.0%}, and policy allows {rules.drop_at_most:.0%} less at most."
                )
        if reading.broken > rules.broken_at_most:
            found.append(
                f"Of its answers to {reading.prompts} probe prompts {reading.broken:.0%} are empty or incoherent, and "
                f"policy allows {rules.broken_at_most:.0%}."
            )
        return found

    def numbers(self, reading: Reading) -> dict[str, float]:
        """A reading as the log keeps it."""
        found = {
            "prompts": float(reading.prompts),
            "refused": reading.refused,
            "complied": reading.complied,
            "broken": reading.broken,
        }
        if self._of_base is not None:
            found["base_refused"] = self._of_base.refused
        return found

    def base_reading(self) -> Reading:
        """What the base answers; measured once, since it does not change. Raises as `measure` does."""
        if self._of_base is None:
            self._of_base = self.measure(None)  # two threads may both measure it, and find the same
        return self._of_base

    def _request(self, tokenizer: Any, tenant: str | None, text: str) -> Request:
        try:
            with reading("the tokenizer"):
                prompt = self._encode(tokenizer, text)
        except DeltakeeperError as error:
            raise self._fault(tokenizer, error) from error
        # a salt of its own: nobody learns from the time of a first token what was asked here
        return Request(prompt, tenant, self.rules.new_tokens, cache_salt="canary")

    def _encode(self, tokenizer: Any, text: str) -> tuple[int, ...]:
        system = self.rules.system
        turns = [{"role": "user", "content": text}]
        if system is not None:
            turns.insert(0, {"role": "system", "content": system})
        elif not getattr(tokenizer, "chat_template", None):
            return self._fitting(tokenizer(text)["input_ids"])
        rendered = self._templates.render(tokenizer, turns)
        return self._fitting(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _fitting(self, ids: list[int]) -> tuple[int, ...]:
        if not 0 < len(ids) < self._engine.context:
            raise DataError(f"it gives {len(ids):,} tokens, and 1 to {self._engine.context - 1:,} can be asked")
        return tuple(ids)

    def _fault(self, tokenizer: Any, error: DeltakeeperError) -> DeltakeeperError:
        """What it means that a prompt could not be made into tokens: whose words failed, and whether that may pass."""
        own, what = tokenizer is not self._tokenizer, "words"
        if isinstance(error, TemplateError):
            own, what = not self._templates.trusts(tokenizer), "chat template"
        told = str(error).rstrip(".")
        if not own:
            return CanaryError(f"the canary could not be run: its prompts do not go into the base's {what} ({told}).")
        if isinstance(error, TemplateEndedError | TenantError):
            return CanaryError(f"the canary could not be run: the delta's own {what} gave nothing ({told}).")
        return SideFileError(f"The canary's prompts do not go into its own {what}: {told}.")

    def _submit(self, request: Request, end: float) -> Stream:
        while True:
            try:
                return self._engine.submit(request)
            except QueueFullError:
                if time.monotonic() > end:
                    raise
                time.sleep(_PAUSE)

    def _answer(self, stream: Stream, end: float) -> Completion:
        """A whole answer; one that ended with an error counts as empty, since a delta may make any row fail."""
        while stream.get(max(0.0, end - time.monotonic())) is not None:
            pass
        answer = stream.completion()
        if answer.finish_reason == "cancelled" or not self._engine.alive:
            raise EngineError(answer.error or "the engine ended an answer early.")
        return answer


def _read_prompts(file: PolicyFile, rules: CanaryRules) -> tuple[str, ...]:
    rows = load_prompts("harmful" if rules.prompts == "harmful" else file.path(rules.prompts))
    heldout = interleave([row for row in rows if row.split == "heldout"])
    if not heldout:
        raise DataError(f"the canary's prompts '{rules.prompts}' have no rows of the split 'heldout'; give some.")
    return tuple(row.prompt for row in heldout[: rules.count])
