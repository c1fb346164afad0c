"""Utility: benchmarks of lm-evaluation-harness and perplexity, item by item, of many models at once."""

from deltakeeper.evals.utility.comparison import Comparison, Summary, compare, summarise
from deltakeeper.evals.utility.prepare import Prepared, TaskFacts, prepared
from deltakeeper.evals.utility.records import ItemRecord, Measure, by_measure, pair, read_lines, to_lines
from deltakeeper.evals.utility.run import ask, run_tasks
from deltakeeper.evals.utility.samples import choose
from deltakeeper.evals.utility.scorer import ModelScorer, Score, Scorer
from deltakeeper.evals.utility.tasks import TaskSource, parse_task

__all__ = [
    "Comparison",
    "ItemRecord",
    "Measure",
    "ModelScorer",
    "Prepared",
    "Score",
    "Scorer",
    "Summary",
    "TaskFacts",
    "TaskSource",
    "ask",
    "by_measure",
    "choose",
    "compare",
    "pair",
    "parse_task",
    "prepared",
    "read_lines",
    "run_tasks",
    "summarise",
    "to_lines",
]
