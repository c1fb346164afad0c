"""What evaluation asks of a model, whatever computes it; and a model of transformers that gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from deltakeeper.evals.generate import generate_answers
from deltakeeper.evals.perplexity import passage_nll


class Answerer(Protocol):
    """A model that can be asked."""

    def answer(self, prompts: Sequence[str], *, max_new_tokens: int, system: str | None = None) -> list[str]:
        """Greedy answers to chat prompts, in their order, without special tokens.

        Args:
            prompts: user messages.
            max_new_tokens: length at which an answer is cut.
            system: system message; None leaves it to the chat template.
        """

    def nll(self, texts: Sequence[str]) -> tuple[list[float], list[int]]:
        """Summed negative log-likelihood (nats) and number of predicted tokens of each plain text.

        The first token is context only, and a text without a second one counts nothing. Softmax is float32.
        """


class LoadedModel:
    """A model and its tokenizer, asked through transformers alone: what other ways to compute are held against."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 64) -> None:
        """Ask a model that is in memory.

        Args:
            model: a Hugging Face causal language model in evaluation mode.
            tokenizer: its tokenizer, with a chat template.
            batch_size: prompts generated together.
        """
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def answer(self, prompts: Sequence[str], *, max_new_tokens: int, system: str | None = None) -> list[str]:
        """See `Answerer.answer`."""
        return generate_answers(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=self.batch_size,
            system=system,
        )

    def nll(self, texts: Sequence[str]) -> tuple[list[float], list[int]]:
        """See `Answerer.nll`."""
        return passage_nll(self.model, self.tokenizer, texts)
