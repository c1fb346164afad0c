"""Perplexity of a text, passage by passage, as item records."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

from deltakeeper.errors import DataError, RunError
from deltakeeper.evals.utility.records import ItemRecord
from deltakeeper.evals.utility.scorer import Ids, Score, Scorer

TASK = "text"


def passage_records(
    scorer: Scorer, texts: Mapping[int, str], progress: Callable[[str, int, int], None] | None = None
) -> list[ItemRecord]:
    """Negative log-likelihood `nll` (nats) and number of predicted `tokens` of each passage, for each arm.

    Passages are read as plain text; the first token of each is context only, as in
    `deltakeeper.evals.perplexity.passage_nll`, and a passage without a second one is left out. Passages longer than the
    context are read in windows. Perplexity is `exp(sum(nll) / sum(tokens))`.

    Args:
        scorer: the models.
        texts: passages by their number.
        progress: told of windows.

    Raises:
        DataError: no passage has two tokens.
        RunError: a likelihood is not a finite number.
    """
    encoded = {
        number: tuple(scorer.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for number, text in texts.items()
    }
    cut = {number: windows(ids, scorer.context) for number, ids in encoded.items() if len(ids) > 1}
    if not cut:
        raise DataError("no passage of the text has two tokens; give a longer text.")
    tell = None if progress is None else lambda done, total: progress("passages", done, total)
    scores = iter(scorer.loglikelihoods([pair for pairs in cut.values() for pair in pairs], tell))
    records = []
    for number, pairs in cut.items():
        parts: list[tuple[Score, ...]] = [next(scores) for _ in pairs]
        hashed = hashlib.sha256(texts[number].encode()).hexdigest()
        for arm, name in enumerate(scorer.arms):
            nll = -math.fsum(part[arm].logprob for part in parts)
            if not math.isfinite(nll):
                raise RunError(f"the likelihood of passage {number} is {nll}; check the weights of {name}.")
            values = {"nll": nll, "tokens": float(len(encoded[number]) - 1)}
            records += [ItemRecord(TASK, number, "none", key, value, hashed, arm=name) for key, value in values.items()]
    return records


def windows(ids: Ids, most: int) -> list[tuple[Ids, Ids]]:
    """Contexts and continuations that predict every token but the first once.

    The last window reaches back as far as it may, as in lm-evaluation-harness.

    Args:
        ids: at least two tokens.
        most: most tokens of a window, at least 2.
    """
    cut = [(ids[:1], ids[1:most])]
    done = min(most, len(ids))
    while done < len(ids):
        end = min(done + most - 1, len(ids))
        cut.append((ids[max(0, end - most) : done], ids[done:end]))
        done = end
    return cut
