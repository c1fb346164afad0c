"""lm-evaluation-harness' view of a scorer; the only module that imports its classes at the top."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from deltakeeper.errors import DataError
from deltakeeper.evals.utility.scorer import Ids, Score, Scorer

_log = logging.getLogger(__name__)
NEW_TOKENS = 256
"""Longest answer where a task says nothing, as in lm-evaluation-harness."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

Question = tuple[str, Any]
"""A context as text, and its continuation or the settings of its answer; names what was cut."""


class Answered:
    """What a scorer has said so far: all arms are asked when the first one is, in one batch.

    Attributes:
        scorer: who is asked.
        cut: texts of which the start was left out because the context is too short.
        asked: questions that were computed, for each of all arms; equal ones once.
    """

    def __init__(self, scorer: Scorer, progress: Callable[[str, int, int], None] | None = None) -> None:
        self.scorer = scorer
        self.cut: set[tuple[str, str]] = set()
        self.asked = 0
        self._progress = progress
        self._scores: dict[tuple[Ids, Ids], tuple[Score, ...]] = {}
        self._texts: dict[tuple[Ids, tuple[str, ...], int], tuple[str, ...]] = {}

    def scores(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[Score, ...]]:
        """Scores of all arms for each pair."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._scores]
        if new:
            found = self.scorer.loglikelihoods(new, self._telling("likelihoods"))
            self._scores.update(zip(new, found, strict=True))
            self.asked += len(new)
        return [self._scores[pair] for pair in pairs]

    def texts(self, questions: Sequence[tuple[Ids, tuple[str, ...], int]]) -> list[tuple[str, ...]]:
        """Answers of all arms to each prompt with its stops and its most tokens."""
        groups: dict[tuple[tuple[str, ...], int], list[Ids]] = {}
        for prompt, stops, most in dict.fromkeys(questions):
            if (prompt, stops, most) not in self._texts:
                groups.setdefault((stops, most), []).append(prompt)
        for (stops, most), prompts in groups.items():
            for prompt, text in zip(
                prompts, self.scorer.generate(prompts, stops, most, self._telling("answers")), strict=True
            ):
                self._texts[prompt, stops, most] = text
            self.asked += len(prompts)
        return [self._texts[question] for question in questions]

    def _telling(self, what: str) -> Callable[[int, int], None] | None:
        tell = self._progress
        return None if tell is None else lambda done, total: tell(what, done, total)


class ScorerLM(TemplateLM):  # type: ignore[misc]  # the library has no types
    """One arm of a scorer, as lm-evaluation-harness asks for it."""

    def __init__(self, answered: Answered, arm: int = 0) -> None:
        """Speak for an arm.

        Args:
            answered: the scorer and what it has said; shared between its arms.
            arm: number of the arm.
        """
        super().__init__()
        self.answered, self.arm = answered, arm
        self.tokenizer = answered.scorer.tokenizer
        self.max_length = answered.scorer.context

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-text token, which benchmarks need; give it one.")
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer and its template."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; as the tokenizer likes it, but never with two beginnings."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ids = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return list(ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns of a chat as the model was taught to read them.

        Raises:
            DataError: there is no template, or it refuses the turns.
        """
        if not self.tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template; evaluate without --chat.")
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise DataError(
                f"the chat template does not take a benchmark's turns ({error}); leave out --chat."
            ) from error

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Scores of (context, continuation) texts; the pair is encoded as a whole, then cut where the context ends."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for texts, context, continuation in requests:
            room = self.max_length - len(continuation)
            if not continuation or room < 1:
                raise DataError(
                    f"a continuation of {len(continuation)} tokens cannot be scored with a context of "
                    f"{self.max_length}; leave the item out, or check the tokenizer."
                )
            if len(context) > room:
                self._tell_cut(texts, len(context) - room)
            pairs.append((tuple(context[-room:]), tuple(continuation)))
        return [(*scores[self.arm],) for scores in self.answered.scores(pairs)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, in windows of the model's context where they are longer."""
        windows: list[list[tuple[None, list[int], list[int]]]] = []
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length - 1, 1)
            windows.append([(None, *make_disjoint_window(window)) for window in cut])
        flat = iter(self._loglikelihood_tokens([window for of_text in windows for window in of_text]))
        return [sum(next(flat)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy answers.

        Raises:
            DataError: a task wants random answers, or longer ones than the context.
        """
        questions = []
        for context, settings in (request.args for request in requests):
            stops, most = _settings(settings)
            ids, room = self.tok_encode(context), self.max_length - most
            if room < 1 or not ids:
                raise DataError(
                    f"a task asks for {most} new tokens after {len(ids)} tokens, but the context is "
                    f"{self.max_length} tokens; leave the task out."
                )
            if len(ids) > room:
                self._tell_cut((context, ""), len(ids) - room)
            questions.append((tuple(ids[-room:]), stops, most))
        return [texts[self.arm] for texts in self.answered.texts(questions)]

    def _tell_cut(self, texts: tuple[str, str] | None, tokens: int) -> None:
        if texts is not None and texts not in self.answered.cut:
            self.answered.cut.add(texts)
            _log.warning("a prompt lost its first %d tokens: the context has room for %d", tokens, self.max_length)


def _settings(given: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Stops and most tokens of a task's generation settings."""
    if given.get("do_sample") or given.get("temperature"):
        raise DataError("a task wants random answers, which cannot be compared item by item; leave the task out.")
    until = given.get("until") or []
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
    lengths = [int(given[name]) for name in _LENGTHS if given.get(name) is not None]
    return stops, lengths[0] if lengths else NEW_TOKENS
