"""How large requests are: tokens of prompts and answers, and what was asked for, under vLLM's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Histogram

_ANSWERS = (1, 2, 5, 10, 20)
"""vLLM's buckets of `n`."""


class RequestSizes:
    """Histograms of numbers of tokens and answers.

    Args:
        registry: where they stand.
        labels: that each series has.
        context: most tokens of prompt and answer, the last bucket at most.
    """

    def __init__(self, registry: CollectorRegistry, labels: Mapping[str, str], context: int) -> None:
        tokens = tuple(_steps(context))

        def sizes(name: str, about: str, buckets: Sequence[int] = tokens) -> Histogram:
            made = Histogram(f"vllm:{name}", about, list(labels), registry=registry, buckets=buckets)
            return made.labels(**labels)

        self._prompt = sizes("request_prompt_tokens", "Tokens of a prompt.")
        self._computed = sizes("request_prefill_kv_computed_tokens", "Of those, not found in the cache.")
        self._answer = sizes("request_generation_tokens", "Tokens of an answer.")
        self._longest = sizes("request_max_num_generation_tokens", "Tokens of the longest answer to a prompt.")
        self._n = sizes("request_params_n", "Answers that were asked for to a prompt.", _ANSWERS)
        self._allowed = sizes("request_params_max_tokens", "Tokens that an answer might have had.")

    def answered(self, prompt: int, cached: int, tokens: int) -> None:
        """An answer has ended; its prompt's tokens, those of them that were found in the cache, and its own."""
        self._prompt.observe(prompt)
        self._computed.observe(max(0, prompt - cached))
        self._answer.observe(tokens)

    def prompt_done(self, tokens: Sequence[int], allowed: int) -> None:
        """All answers to a prompt have ended; see `Observer.prompt_done`."""
        self._n.observe(len(tokens))
        self._longest.observe(max(tokens))
        for _ in tokens:
            self._allowed.observe(allowed)


def _steps(most: int) -> Iterator[int]:
    """1, 2, 5, 10, 20, 50 and so on, as far as `most`: vLLM's buckets of tokens."""
    power = 1
    while True:
        for step in (power, 2 * power, 5 * power):
            if step > most:
                return
            yield step
        power *= 10
