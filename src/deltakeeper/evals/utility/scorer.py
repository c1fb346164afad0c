"""What a benchmark asks of models, whatever computes it; and one model of transformers that answers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

Ids = tuple[int, ...]
Progress = Callable[[int, int], None]
"""Called with (questions done, questions in all)."""


class Score(NamedTuple):
    """How likely a continuation is.

    Attributes:
        logprob: natural logarithm of its probability after its context.
        greedy: whether each of its tokens is a likeliest one.
    """

    logprob: float
    greedy: bool


class Scorer(Protocol):
    """One or more models of one tokenizer that are asked the same questions."""

    @property
    def arms(self) -> tuple[str, ...]:
        """Their names; every answer has one entry for each, in this order."""

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer."""

    @property
    def context(self) -> int:
        """Most tokens that a context and its continuation may have together."""

    def loglikelihoods(
        self, pairs: Sequence[tuple[Ids, Ids]], progress: Progress | None = None
    ) -> list[tuple[Score, ...]]:
        """Likelihood of each continuation after its context.

        Args:
            pairs: token ids of context and continuation, at least one each and at most `context` together.
            progress: told of pairs.
        """

    def generate(
        self, prompts: Sequence[Ids], stops: Sequence[str], max_new_tokens: int, progress: Progress | None = None
    ) -> list[tuple[str, ...]]:
        """Greedy answers, each cut before the first of `stops`; end-of-text ends one as well.

        Args:
            prompts: token ids, at least one each; with `max_new_tokens` at most `context`.
            stops: strings that end an answer.
            max_new_tokens: length at which an answer is cut.
            progress: told of prompts.
        """


class ModelScorer:
    """A model in memory, asked through transformers alone: what faster ways to compute are held against.

    Answers are generated one prompt at a time.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str = "model", context: int | None = None, batch_size: int = 8
    ) -> None:
        """Ask a model that is in memory.

        Args:
            model: a Hugging Face causal language model in evaluation mode.
            tokenizer: its tokenizer.
            name: what it is called in records.
            context: most tokens of a context and its continuation; what the model was made for, by default.
            batch_size: pairs that are scored together.
        """
        self.model, self.tokenizer, self.arms, self.batch_size = model, tokenizer, (name,), batch_size
        self.context = int(context or getattr(model.config, "max_position_embeddings", None) or 2048)

    @torch.inference_mode()
    def loglikelihoods(
        self, pairs: Sequence[tuple[Ids, Ids]], progress: Progress | None = None
    ) -> list[tuple[Score, ...]]:
        """See `Scorer.loglikelihoods`; the softmax is float32."""
        found: list[tuple[Score, ...]] = [()] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            whole = [[*pairs[i][0], *pairs[i][1]] for i in rows]
            width = max(map(len, whole)) - 1  # the last token is only looked at
            ids = torch.zeros((len(rows), width), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for j, tokens in enumerate(whole):  # padding on the right is never attended to by what stands before it
                ids[j, : len(tokens) - 1] = torch.tensor(tokens[:-1])
                mask[j, : len(tokens) - 1] = 1
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
            logits = self.model(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).logits  # (batch, width, vocabulary)
            for j, i in enumerate(rows):
                first, last = len(pairs[i][0]) - 1, len(whole[j]) - 1
                logs = logits[j, first:last].float().log_softmax(-1)  # (continuation, vocabulary)
                wanted = torch.tensor(pairs[i][1], device=logs.device)[:, None]
                own = logs.gather(1, wanted).squeeze(1)
                found[i] = (Score(float(own.sum()), bool((own >= logs.amax(-1)).all())),)
            if progress:
                progress(min(start + self.batch_size, len(order)), len(order))
        return found

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Ids], stops: Sequence[str], max_new_tokens: int, progress: Progress | None = None
    ) -> list[tuple[str, ...]]:
        """See `Scorer.generate`."""
        found: list[tuple[str, ...]] = []
        for done, prompt in enumerate(prompts, 1):
            found.append((self._answer(prompt, stops, max_new_tokens),))
            if progress:
                progress(done, len(prompts))
        return found

    def _answer(self, prompt: Ids, stops: Sequence[str], max_new_tokens: int) -> str:
        ends = stop_tokens(self.tokenizer, stops) | _configured_ends(self.model)
        ids, cache, given, text = torch.tensor([prompt], device=self.model.device), None, list[int](), ""
        while len(given) < max_new_tokens:
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
            if token in ends:
                break
            given.append(token)
            text = self.tokenizer.decode(given, skip_special_tokens=True)
            if any(stop in text for stop in stops):
                break
            ids = ids.new_tensor([[token]])
        return cut(text, stops)


def stop_tokens(tokenizer: Any, stops: Sequence[str]) -> set[int]:
    """Tokens that end an answer: the tokenizer's end of text, and those stops that are special tokens.

    A special token has no text in a decoded answer, so no search for its string would find it.
    """
    named = [tokenizer.convert_tokens_to_ids(stop) for stop in stops if stop in set(tokenizer.all_special_tokens)]
    return {int(token) for token in (*named, tokenizer.eos_token_id) if token is not None}


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of some strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _configured_ends(model: Any) -> set[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return {int(end) for end in (ends if isinstance(ends, list) else [ends]) if end is not None}
