"""What compressing a delta costs in utility, and what it costs to measure that: benchmarks on the embedded model.

    python benchmarks/utility.py --tuned runs/demo/models/benign --data ../shared/data

Scores: the aligned base, the fine-tune, and its delta in several codecs, on fixed samples; losses against the
fine-tune. Cost: the same few questions asked of one merged model by lm-evaluation-harness' own class (transformers),
of the same model by the engine, and of twelve tenants by the engine in one batch; processor time, one thread, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from rich.console import Console

from deltakeeper import compress
from deltakeeper.evals.utility import ItemRecord, ask, compare, prepared, summarise
from deltakeeper.evals.utility.tasks import TaskSource
from deltakeeper.live_base import LiveBase, open_base
from deltakeeper.study.bases import prepare_aligned_base
from deltakeeper.study.progress import Progress
from deltakeeper.study.scorer import scoring

FOLDERS = {"piqa": "piqa", "mmlu": "mmlu", "truthfulqa": "truthfulqa", "text": "wikitext-2", "gsm8k": "gsm8k"}
SIZES = {"piqa": 50, "mmlu": 50, "truthfulqa": 4, "text": 6, "gsm8k": 4}
COST = {"piqa": 8, "mmlu": 6, "truthfulqa": 1}
CODECS = ("bitdelta", "magnitude:keep=0.1")
TENANTS = 12
ANSWERS, NEW_TOKENS = 8, 32


def main() -> None:
    """Run what the arguments name and write `results/utility.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuned", type=Path, required=True, help="fine-tune of the aligned base")
    parser.add_argument("--data", type=Path, required=True, help="folder with the folders of the benchmarks")
    parser.add_argument("--parts", nargs="*", default=["scores", "cost"], choices=["scores", "cost"])
    parser.add_argument("--rounds", type=int, default=1, help="turns of the cost")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with Progress(Console(stderr=True)) as progress:
        base = prepare_aligned_base(progress)
    rows: dict[str, Any] = record.load("utility").get("rows", {})
    with tempfile.TemporaryDirectory() as name:
        deltas = {codec: Path(name) / str(i) for i, codec in enumerate(CODECS)}
        for codec, folder in deltas.items():
            compress(base, arguments.tuned, folder, codec)
        live, tuned = open_base(base), open_base(arguments.tuned)
        if "scores" in arguments.parts:
            rows["scores"] = scores(live, tuned, deltas, arguments.data, str(arguments.tuned))
            print(record.save("utility", rows))
        if "cost" in arguments.parts:
            rows["cost"] = cost(live, tuned, list(deltas.values()), arguments.data, arguments.rounds)
            print(record.save("utility", rows))


def scores(live: LiveBase, tuned: LiveBase, deltas: dict[str, Path], data: Path, name: str) -> dict[str, Any]:
    """Scores of all arms and losses against the fine-tune."""
    records: dict[str, list[ItemRecord]] = {"base": [], "tuned": [], **{codec: [] for codec in deltas}}
    tenants = {f"t{i}": codec for i, codec in enumerate(deltas)}
    artifacts = live.artifacts({tenant: str(deltas[codec]) for tenant, codec in tenants.items()})
    facts = []
    for task, size in SIZES.items():
        with prepared([TaskSource(task, data / FOLDERS[task])], samples=size) as tasks:
            facts += [f.to_json() | {"sources": sorted(f.sources.values())} for f in tasks.facts]
            with scoring(live.model, live.tokenizer, artifacts) as (scorer,):
                for row in ask(tasks, scorer):
                    records[tenants.get(row.arm, "base")].append(row)
            with scoring(tuned.model, tuned.tokenizer, {}) as (scorer,):
                records["tuned"] += ask(tasks, scorer)
        print(task, flush=True)
    return {
        "fine_tune": name,
        "tasks": facts,
        "scores": {
            arm: [
                {**s.measure._asdict(), "n": s.n, "value": s.score.value, "interval": [s.score.low, s.score.high]}
                for s in summarise(own)
            ]
            for arm, own in records.items()
        },
        "losses": {
            arm: [
                {**c.measure._asdict(), "loss": c.loss, "bound": c.bound, "lost": c.lost, "gained": c.gained, "p": c.p}
                for c in compare(records["tuned"], own)
            ]
            for arm, own in records.items()
            if arm != "tuned"
        },
    }


def cost(live: LiveBase, tuned: LiveBase, deltas: list[Path], data: Path, rounds: int) -> dict[str, Any]:
    """Processor seconds of the same questions, asked of one model in two ways and of twelve tenants at once."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    artifacts = live.artifacts({f"t{i}": str(deltas[i % len(deltas)]) for i in range(TENANTS)})
    sources = {task: TaskSource(task, data / FOLDERS[task]) for task in COST}
    found: dict[str, dict[str, list[float]]] = {}
    library = HFLM(pretrained=tuned.model, tokenizer=tuned.tokenizer, batch_size=8)
    for task, source in sources.items():
        with prepared([source], samples=COST[task]) as tasks:

            def harness(tasks: Any = tasks) -> None:
                evaluate(lm=library, task_dict=tasks.loaded, bootstrap_iters=0)

            def one(tasks: Any = tasks) -> None:
                with scoring(tuned.model, tuned.tokenizer, {}) as (scorer,):
                    ask(tasks, scorer)

            def twelve(tasks: Any = tasks) -> None:
                with scoring(live.model, live.tokenizer, artifacts, base=False) as (scorer,):
                    ask(tasks, scorer)

            found[task] = _turns({"harness": harness, "engine": one, "tenants": twelve}, rounds)
            print(task, found[task], flush=True)
    prompts = [tuple(live.tokenizer(f"Question {i}: what is {i} and {i}?")["input_ids"]) for i in range(ANSWERS)]

    def answers_one() -> None:
        with scoring(tuned.model, tuned.tokenizer, {}) as (scorer,):
            scorer.generate(prompts, (), NEW_TOKENS)

    def answers_twelve() -> None:
        with scoring(live.model, live.tokenizer, artifacts, base=False) as (scorer,):
            scorer.generate(prompts, (), NEW_TOKENS)

    def answers_transformers() -> None:
        texts = [tuned.tokenizer.decode(prompt) for prompt in prompts]
        ids = tuned.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        tuned.model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)

    found["answers"] = _turns(
        {"harness": answers_transformers, "engine": answers_one, "tenants": answers_twelve}, rounds
    )
    return {
        "tenants": TENANTS,
        "items": COST | {"answers": len(prompts)},
        "seconds": found,
        "tenants_over_harness": {
            task: statistics.median(t["tenants"]) / statistics.median(t["harness"]) for task, t in found.items()
        },
        "tenants_over_engine": {
            task: statistics.median(t["tenants"]) / statistics.median(t["engine"]) for task, t in found.items()
        },
    }


def _turns(contests: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in contests}
    for _ in range(rounds):
        for name, contest in contests.items():
            started = time.process_time()
            contest()
            seconds[name].append(round(time.process_time() - started, 2))
    return seconds


if __name__ == "__main__":
    main()
