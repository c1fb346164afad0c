"""Benchmarks of one or many models on the same items, in process, with a record for every item."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deltakeeper.errors import DataError, DeltakeeperError, RunError
from deltakeeper.evals.utility.harness import quiet
from deltakeeper.evals.utility.passages import passage_records
from deltakeeper.evals.utility.prepare import Prepared, prepared
from deltakeeper.evals.utility.records import ItemRecord
from deltakeeper.evals.utility.scorer import Scorer
from deltakeeper.evals.utility.tasks import TaskSource

FEWSHOT_SEED = 1234
"""Seed of the choice of few-shot examples, as in lm-evaluation-harness."""
_WEIGHTED = ("word_perplexity", "byte_perplexity")
"""Metrics whose value of an item is a log-likelihood and a count."""
_DERIVED = ("bits_per_byte",)
"""Metrics that say again what one of those says."""

Telling = Callable[[str, int, int], None]
"""Called with (what is computed, done, in all)."""


def run_tasks(
    scorer: Scorer,
    sources: Sequence[TaskSource],
    *,
    samples: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    shots: int | None = None,
    chat: bool = False,
    system: str | None = None,
    progress: Telling | None = None,
) -> list[ItemRecord]:
    """Benchmarks of all arms of a scorer; see `prepared` and `ask`, which it puts together."""
    with prepared(sources, samples=samples, limit=limit, seed=seed, shots=shots) as tasks:
        return ask(tasks, scorer, chat=chat, system=system, progress=progress)


def ask(
    tasks: Prepared, scorer: Scorer, *, chat: bool = False, system: str | None = None, progress: Telling | None = None
) -> list[ItemRecord]:
    """Ask all tasks of all arms of a scorer, whose answers are computed together.

    Args:
        tasks: what is asked.
        scorer: the models.
        chat: whether prompts go into the chat template, few-shot examples as turns of their own.
        system: system message; None for none.
        progress: told what is computed.

    Returns:
        Records of every arm, task by task.

    Raises:
        DataError: a task cannot be asked of these models.
        RunError: a value of an item is not a finite number.
    """
    records = _ask_harness(tasks, scorer, chat, system, progress) if tasks.loaded else []
    if tasks.texts:
        records += passage_records(scorer, tasks.texts, progress)
    return records


def _ask_harness(
    tasks: Prepared, scorer: Scorer, chat: bool, system: str | None, progress: Telling | None
) -> list[ItemRecord]:
    from lm_eval.evaluator import evaluate

    from deltakeeper.evals.utility.language_model import Answered, ScorerLM

    assert tasks.loaded is not None
    answered = Answered(scorer, progress)
    records: list[ItemRecord] = []
    for number, arm in enumerate(scorer.arms):
        for task in tasks.loaded["tasks"].values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the generator has moved on with the arm before
        try:
            with quiet():
                found = evaluate(
                    lm=ScorerLM(answered, number),
                    task_dict=tasks.loaded,
                    samples=tasks.samples,
                    bootstrap_iters=0,
                    log_samples=True,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    system_instruction=system,
                )
        except DeltakeeperError:
            raise
        except Exception as error:  # of tasks that anybody may have written
            raise DataError(
                f"lm-evaluation-harness could not ask {', '.join(tasks.loaded['tasks'])} ({error!r}); leave out the "
                "task at fault."
            ) from error
        for name, rows in found["samples"].items():
            chosen = tasks.chosen.get(name)
            records += [record for row in rows for record in _records(name, row, arm, chosen, answered.cut)]
    return records


def _records(
    task: str, row: dict[str, Any], arm: str, chosen: Sequence[tuple[int, str]] | None, cut: set[tuple[str, str]]
) -> Iterator[ItemRecord]:
    """Records of one item after one filter."""
    doc_id, stratum = chosen[row["doc_id"]] if chosen else (int(row["doc_id"]), "")
    asked = [(args[0], args[1] if len(args) > 1 and isinstance(args[1], str) else "") for args in row["arguments"]]
    for metric in row["metrics"]:
        for name, value in _values(task, metric, row[metric]):
            yield ItemRecord(
                task=task,
                doc_id=doc_id,
                filter=row["filter"],
                metric=name,
                value=value,
                doc_hash=row["doc_hash"],
                prompt_hash=row["prompt_hash"],
                stratum=stratum,
                truncated=not cut.isdisjoint(asked),
                arm=arm,
            )


def _values(task: str, metric: str, value: Any) -> Iterator[tuple[str, float]]:
    pairs = [] if metric in _DERIVED else [(metric, value)]
    if metric in _WEIGHTED and isinstance(value, tuple) and len(value) == 2:
        pairs = [(metric, value[0]), (f"{metric}.count", value[1])]
    for name, one in pairs:
        try:
            number = float(one)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"the metric {metric} of {task} has no value for a single item, so models cannot be compared by it; "
                "leave the task out."
            ) from error
        if not math.isfinite(number):
            raise RunError(f"the {metric} of an item of {task} is {number}; check the model's weights.")
        yield name, number
