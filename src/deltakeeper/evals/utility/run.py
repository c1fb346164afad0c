"""Benchmarks of one or many models on the same items, in process, with a record for every item."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deltakeeper.errors import DataError, RunError
from deltakeeper.evals.utility.harness import load_harness, quiet
from deltakeeper.evals.utility.passages import passage_records
from deltakeeper.evals.utility.records import ItemRecord
from deltakeeper.evals.utility.samples import choose
from deltakeeper.evals.utility.scorer import Scorer
from deltakeeper.evals.utility.tasks import TEXT, TaskSource, read_source, write_tasks

FEWSHOT_SEED = 1234
"""Seed of the choice of few-shot examples, as in lm-evaluation-harness."""
_WEIGHTED = ("word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics whose value of an item is a log-likelihood and a count."""

Telling = Callable[[str, int, int], None]
"""Called with (what is computed, done, in all)."""


@dataclass(frozen=True)
class TaskFacts:
    """Where the items of a task come from.

    Attributes:
        task: its name in records.
        shots: few-shot examples before each item.
        items: how many items are asked.
        of: how many there are.
        sources: SHA-256 of each file, by path; empty for data from the hub.
    """

    task: str
    shots: int
    items: int
    of: int
    sources: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


class TaskSet:
    """Tasks that are read, sampled and ready to be asked of any scorer.

    Attributes:
        facts: of each task.
    """

    def __init__(
        self,
        facts: Sequence[TaskFacts],
        loaded: dict[str, Any] | None,
        chosen: Mapping[str, Sequence[tuple[int, str]]],
        samples: dict[str, list[int]],
        texts: Mapping[int, str],
    ) -> None:
        """Hold what `prepared` has made.

        Args:
            facts: of each task.
            loaded: tasks of lm-evaluation-harness, as it loads them.
            chosen: number and stratum of each row of those tasks that hold the chosen items alone.
            samples: the chosen items of the others.
            texts: passages for perplexity, by number.
        """
        self.facts = tuple(facts)
        self._loaded, self._chosen, self._samples, self._texts = loaded, chosen, samples, texts

    def run(
        self, scorer: Scorer, *, chat: bool = False, system: str | None = None, progress: Telling | None = None
    ) -> list[ItemRecord]:
        """Ask all tasks of all arms, which are computed together.

        Args:
            scorer: the models.
            chat: whether prompts go into the chat template, few-shot examples as turns of their own.
            system: system message; None for none.
            progress: told what is computed.

        Raises:
            DataError: a task cannot be asked of these models.
            RunError: a value of an item is not a finite number.
        """
        records = self._ask_harness(scorer, chat, system, progress) if self._loaded else []
        if self._texts:
            records += passage_records(scorer, self._texts, progress)
        return records

    def _ask_harness(
        self, scorer: Scorer, chat: bool, system: str | None, progress: Telling | None
    ) -> list[ItemRecord]:
        from lm_eval.evaluator import evaluate

        from deltakeeper.evals.utility.language_model import Answered, ScorerLM

        assert self._loaded is not None
        answered = Answered(scorer, progress)
        records: list[ItemRecord] = []
        for number, arm in enumerate(scorer.arms):
            for task in self._loaded["tasks"].values():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the generator has moved on with the arm before
            with quiet():
                found = evaluate(
                    lm=ScorerLM(answered, number),
                    task_dict=self._loaded,
                    samples=self._samples,
                    bootstrap_iters=0,
                    log_samples=True,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    system_instruction=system,
                )
            for name, rows in found["samples"].items():
                records += [
                    record for row in rows for record in _records(name, row, arm, self._chosen.get(name), answered.cut)
                ]
        return records


@contextmanager
def prepared(
    sources: Sequence[TaskSource],
    *,
    samples: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    shots: int | None = None,
) -> Iterator[TaskSet]:
    """Read benchmarks and choose their items; what is written lies in a temporary folder until the block ends.

    Args:
        sources: which benchmarks.
        samples: items of each task, chosen by `seed` and stratified by subject or category; all by default.
        limit: the first so many items instead.
        seed: seed of the choice.
        shots: few-shot examples of tasks that take any, in place of the usual number.

    Raises:
        DataError: files are missing or malformed, a task is given twice, there is no such task, or
            lm-evaluation-harness is not installed.
    """
    if samples is not None and limit is not None:
        raise DataError("samples are a choice of all items and a limit takes the first ones; give one of them.")
    if shots is not None and shots < 0:
        raise DataError(f"{shots} few-shot examples cannot be shown; give 0 or more.")
    names = [source.name for source in sources]
    if not sources or len(set(names)) < len(names):
        raise DataError("give at least one task, and each once.")

    def pick(strata: Sequence[str]) -> list[int]:
        if limit is not None and limit < 1:
            raise DataError(f"a limit of {limit} items measures nothing; give at least one.")
        if samples is not None:
            return choose(strata, samples, seed)
        return list(range(len(strata) if limit is None else min(limit, len(strata))))

    facts: list[TaskFacts] = []
    chosen: dict[str, list[tuple[int, str]]] = {}
    texts: dict[int, str] = {}
    hub = [source.name for source in sources if source.path is None]
    with tempfile.TemporaryDirectory(prefix="deltakeeper-tasks-") as name:
        folder = Path(name)
        package = load_harness(offline=not hub) if any(source.name != TEXT for source in sources) else None
        site = None if package is None else Path(package.__file__).parent
        for source in (source for source in sources if source.path is not None):
            data = read_source(source)
            ids = pick(data.strata)
            if source.name == TEXT:
                texts = {i: data.rows[i]["text"] for i in ids}
                facts.append(TaskFacts(TEXT, 0, len(ids), len(data.rows), data.sources))
                continue
            assert site is not None
            asked = replace(data, rows=tuple(data.rows[i] for i in ids))
            for task, count in write_tasks(source, asked, folder, site, shots).items():
                chosen[task] = [(i, data.strata[i]) for i in ids]
                facts.append(TaskFacts(task, count, len(ids), len(data.rows), data.sources))
        of_hub: dict[str, list[int]] = {}
        loaded = None
        if package is not None:
            with quiet():
                loaded = _load([*chosen, *hub], folder, defaults=bool(hub))
            for task, config in loaded["tasks"].items():
                if task in chosen:
                    continue
                usual = config.get_config("num_fewshot")
                count = usual or 0 if shots is None or usual == 0 else shots
                config.set_config(key="num_fewshot", value=count)
                total = len(config.eval_docs)
                of_hub[task] = pick([""] * total)
                facts.append(TaskFacts(task, count, len(of_hub[task]), total))
        yield TaskSet(facts, loaded, chosen, of_hub, texts)


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
    """Benchmarks of all arms of a scorer; see `prepared` and `TaskSet.run`, which it puts together."""
    with prepared(sources, samples=samples, limit=limit, seed=seed, shots=shots) as tasks:
        return tasks.run(scorer, chat=chat, system=system, progress=progress)


def _load(names: list[str], folder: Path, *, defaults: bool) -> dict[str, Any]:
    """Tasks of lm-evaluation-harness by name; its own are indexed only where one is asked for, which takes long."""
    from lm_eval.tasks import TaskManager

    level = logging.getLogger("lm_eval").level
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        loaded: dict[str, Any] = TaskManager(include_path=str(folder), include_defaults=defaults).load(names)
    except Exception as error:  # a library that raises all kinds of errors, over the network at that
        raise DataError(
            f"the tasks {', '.join(names)} cannot be loaded ({error}); check their names, and the network for data of "
            "the hub."
        ) from error
    finally:
        logging.getLogger("lm_eval").setLevel(level)
    return loaded


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
    pairs = [(metric, value)]
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
