"""Benchmarks answered by the engine: a base and any of its tenants, asked the same questions in one batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, TypeVar

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.engine import Completion, Engine, EngineSettings, Request, Sampling
from deltakeeper.errors import DataError, RunError
from deltakeeper.evals.utility.scorer import Ids, Progress, Score, cut, stop_tokens
from deltakeeper.prompting import tokenizers
from deltakeeper.tenancy import published

SETTINGS = EngineSettings(kv_bytes=1 << 30, max_running=32)
BASE = "base"
Key = TypeVar("Key")
_TOGETHER = 256
"""Requests that are handed in and forgotten together, so that a large benchmark does not pile up in memory."""
_LISTED = 100
"""Likeliest tokens that are looked at where continuations are single tokens."""


class EngineScorer:
    """A base and tenants of an engine as `deltakeeper.evals.utility.Scorer`.

    A context with several continuations of one token each (the letters of a multiple-choice question) is computed
    once, and the tokens are looked up among the likeliest ones; those that are not there are asked one by one. Longer
    continuations of one context, and contexts with equal beginnings, share what the prefix cache holds.
    """

    def __init__(self, engine: Engine, tokenizer: Any, tenants: Sequence[str | None] = (None,)) -> None:
        """Ask through an engine that nobody else drives.

        Args:
            engine: not started.
            tokenizer: that of all tenants.
            tenants: whom to ask; None for the base.
        """
        self.engine, self.tokenizer = engine, tokenizer
        self.arms = tuple(BASE if tenant is None else tenant for tenant in tenants)
        self._tenants = tuple(tenants)

    @property
    def context(self) -> int:
        """Most tokens of a context and its continuation; the engine wants room for one more."""
        return self.engine.context - 1

    def loglikelihoods(
        self, pairs: Sequence[tuple[Ids, Ids]], progress: Progress | None = None
    ) -> list[tuple[Score, ...]]:
        """See `Scorer.loglikelihoods`; raises RunError where a pair cannot be scored."""
        found: list[list[Score | None]] = [[None] * len(self.arms) for _ in pairs]
        shared = _letters(pairs)
        for context, arm, completion in self._run(shared, lambda c: (c, 1, Sampling(logprobs=_LISTED), None)):
            listed = (completion.logprobs or ())[0].top
            chances = dict(listed)
            for index in shared[context]:
                logprob = chances.get(pairs[index][1][0])
                if logprob is not None:
                    found[index][arm] = Score(logprob, logprob >= listed[0][1])
        left = _apart([index for index, row in enumerate(found) if None in row], pairs)
        done = len(pairs) - len(left)
        for index, arm, completion in self._run(
            left, lambda i: ((*pairs[i][0], *pairs[i][1]), 1, Sampling(), len(pairs[i][0]))
        ):
            entries = (completion.prompt_logprobs or ())[len(pairs[index][0]) :]
            own = [(entry.chosen, entry.top[0][1]) for entry in entries if entry is not None]
            found[index][arm] = Score(sum(chosen for chosen, _ in own), all(chosen >= top for chosen, top in own))
            if arm == len(self.arms) - 1:
                done += 1
                if progress:
                    progress(done, len(pairs))
        return [tuple(score for score in row if score is not None) for row in found]

    def generate(
        self, prompts: Sequence[Ids], stops: Sequence[str], max_new_tokens: int, progress: Progress | None = None
    ) -> list[tuple[str, ...]]:
        """See `Scorer.generate`; raises RunError where a prompt cannot be answered."""
        ends = tuple(sorted(stop_tokens(self.tokenizer, stops)))
        texts = [[""] * len(self.arms) for _ in prompts]
        asked = range(len(prompts))
        for index, arm, completion in self._run(
            asked, lambda i: (prompts[i], max_new_tokens, Sampling(), None), stops, ends
        ):
            ended = completion.finish_reason == "stop" and not isinstance(completion.stop, str)
            ids = completion.tokens[:-1] if ended else completion.tokens
            # Decoded at once: some tokenizers strip the space at the start of a whole answer.
            texts[index][arm] = cut(self.tokenizer.decode(ids, skip_special_tokens=True), stops)
            if progress and arm == len(self.arms) - 1:
                progress(index + 1, len(prompts))
        return [tuple(row) for row in texts]

    def _run(
        self,
        keys: Iterable[Key],
        ask: Callable[[Key], tuple[Ids, int, Sampling, int | None]],
        stops: Sequence[str] = (),
        ends: tuple[int, ...] = (),
    ) -> Iterator[tuple[Key, int, Completion]]:
        """One request a key and arm, `_TOGETHER` at a time; gives key, number of the arm and completion in order."""
        jobs = ((key, arm) for key in keys for arm in range(len(self.arms)))
        while some := list(islice(jobs, _TOGETHER)):
            requests = []
            for key, arm in some:
                prompt, most, sampling, first = ask(key)
                requests.append(
                    Request(
                        prompt,
                        tenant=self._tenants[arm],
                        max_new_tokens=most,
                        sampling=sampling,
                        stop=tuple(stops),
                        stop_tokens=ends,
                        prompt_logprobs=None if first is None else 1,
                        prompt_logprobs_from=first or 1,
                    )
                )
            for (key, arm), completion in zip(some, self.engine.generate(requests), strict=True):
                if completion.finish_reason not in ("stop", "length"):
                    reason = completion.error or f"it was {completion.finish_reason}"
                    raise RunError(f"a question of a benchmark was not answered by {self.arms[arm]}: {reason}")
                yield key, arm, completion


@contextmanager
def scoring(
    model: Any,
    tokenizer: Any,
    artifacts: Mapping[str, DeltaArtifact],
    *,
    base: bool = True,
    settings: EngineSettings | None = None,
) -> Iterator[list[EngineScorer]]:
    """An engine over a live model for the length of a `with` block, and who can be asked through it.

    Tenants whose tokenizer is the base's are one scorer with it; those with words or a template of their own are
    others, since their prompts are other tokens.

    Args:
        model: a Hugging Face decoder in evaluation mode on the CPU.
        tokenizer: its tokenizer.
        artifacts: what each tenant is made of, by name; made from this very model.
        base: whether the base is asked as well.
        settings: of the engine.

    Raises:
        OverlayError: a delta does not fit the model.
        EngineError: the model is not served.
        DataError: a tenant's tokenizer cannot be read, or a tenant is called `base`.
    """
    if BASE in artifacts:
        raise DataError(f"a delta is called '{BASE}', which is what the base itself is called; rename it.")
    with published(model, artifacts) if artifacts else nullcontext() as tenancy:
        words = tokenizers(tokenizer, {} if tenancy is None else tenancy.deltas)
        groups: dict[str, list[str | None]] = {}
        for tenant in ([None] if base else []) + list(artifacts):
            groups.setdefault(_identity(words[tenant]), []).append(tenant)
        overlay = None if tenancy is None else tenancy.overlay
        store = None if tenancy is None else tenancy.tenants
        with Engine(model, tokenizer, overlay=overlay, store=store, settings=settings or SETTINGS) as engine:
            yield [EngineScorer(engine, words[tenants[0]], tenants) for tenants in groups.values()]


def _apart(rows: Sequence[int], pairs: Sequence[tuple[Ids, Ids]]) -> list[int]:
    """Rows in an order in which those of one context are far apart: the later ones then find it in the cache."""
    seen: Counter[Ids] = Counter()
    turns = []
    for index in rows:
        turns.append((seen[pairs[index][0]], index))
        seen[pairs[index][0]] += 1
    return [index for _, index in sorted(turns)]


def _letters(pairs: Sequence[tuple[Ids, Ids]]) -> dict[Ids, list[int]]:
    """Contexts that several continuations of one token follow, and where they stand."""
    found: dict[Ids, list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if len(continuation) == 1:
            found.setdefault(context, []).append(index)
    return {context: rows for context, rows in found.items() if len(rows) > 1}


def _identity(tokenizer: Any) -> str:
    """Equal for tokenizers that make the same tokens of the same texts and chats; slow ones are equal to themselves."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = str(id(tokenizer)) if backend is None else backend.to_str()
    return f"{tokenizer.chat_template!r} {tokenizer.bos_token_id} {tokenizer.eos_token_id} {words}"
