"""Benchmarks read, sampled and loaded: what is asked, before anybody is asked."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deltakeeper.errors import DataError
from deltakeeper.evals.utility.harness import load_harness, quiet
from deltakeeper.evals.utility.samples import choose
from deltakeeper.evals.utility.tasks import TEXT, TaskSource, read_source, write_tasks


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


@dataclass(frozen=True)
class Prepared:
    """Tasks that are ready to be asked; what they read lies in a temporary folder.

    Attributes:
        facts: of each task.
        loaded: tasks of lm-evaluation-harness, as it loads them; None if none is needed.
        chosen: number and stratum of each row of those tasks that hold the chosen items alone.
        samples: the chosen items of the others.
        texts: passages for perplexity, by number.
    """

    facts: tuple[TaskFacts, ...]
    loaded: dict[str, Any] | None
    chosen: Mapping[str, Sequence[tuple[int, str]]]
    samples: dict[str, list[int]]
    texts: Mapping[int, str]


@contextmanager
def prepared(
    sources: Sequence[TaskSource],
    *,
    samples: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    shots: int | None = None,
) -> Iterator[Prepared]:
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
        yield Prepared(tuple(facts), loaded, chosen, of_hub, texts)


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
