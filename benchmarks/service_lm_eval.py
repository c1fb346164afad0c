"""lm-eval's own clients against a live service, beside lm-eval on the merged checkpoint in this process.

    python benchmarks/service_lm_eval.py --data DATA --gsm8k 16 --piqa 24 --dtype float32
    python benchmarks/service_lm_eval.py --data DATA --arms one-bit --asks chats likelihoods

The embedded model is the base; its tenant is the aligned base, compressed to one bit. `deltakeeper serve` is a process
of its own. Compared are scores, every answer, and every log-probability; where two greedy answers part, the record says
by how little the model in this process preferred its token.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import record
import torch
from rich.console import Console

from deltakeeper import compress
from deltakeeper.apply import apply_delta
from deltakeeper.evals.utility import Prepared, prepared
from deltakeeper.evals.utility.harness import quiet
from deltakeeper.evals.utility.run import FEWSHOT_SEED
from deltakeeper.evals.utility.tasks import TaskSource
from deltakeeper.study.bases import prepare_base
from deltakeeper.study.progress import Progress

CODEC, TENANT = "bitdelta:bits=1", "one-bit"
ARMS = ("base", TENANT)
ASKS = ("likelihoods", "completions", "chats")
"""What a model is asked: PIQA's log-likelihoods, GSM8K as completions, and GSM8K as chats."""
START_SECONDS = 300.0
CONTEXT = 8192


def main() -> None:
    """Measure and write `results/service-lm-eval-DTYPE.json`, or `…-DTYPE-ARM.json` where one arm is asked alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the folders gsm8k and piqa")
    parser.add_argument("--gsm8k", type=int, default=16, help="items of GSM8K")
    parser.add_argument("--piqa", type=int, default=24, help="items of PIQA, two log-likelihoods each")
    parser.add_argument("--shots", type=int, default=1, help="few-shot examples of GSM8K")
    parser.add_argument("--new-tokens", type=int, default=96, help="longest answer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="models that are asked")
    parser.add_argument("--asks", nargs="+", choices=ASKS, default=ASKS, help="what they are asked, in this order")
    given = parser.parse_args()
    arms = tuple(dict.fromkeys(given.arms))
    saved = "-".join([f"service-lm-eval-{given.dtype}", *(arms if len(arms) < len(ARMS) else ())])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with Progress(Console(stderr=True)) as progress:
        base, tuned = (prepare_base(name, progress) for name in ("embedded", "embedded-aligned"))
    gsm8k, piqa = TaskSource("gsm8k", given.data / "gsm8k"), TaskSource("piqa", given.data / "piqa")
    runs = []
    with (
        tempfile.TemporaryDirectory() as name,
        prepared([gsm8k], samples=given.gsm8k, shots=given.shots) as answers,
        prepared([piqa], samples=given.piqa) as choices,
    ):
        for task in answers.loaded["tasks"].values():
            limit = {"max_gen_toks": given.new_tokens}
            task.set_config(key="generation_kwargs", value=limit, update=True)
        asked_of = [answers] * bool({"completions", "chats"} & {*given.asks}) + [choices] * (
            "likelihoods" in given.asks
        )
        facts = [
            fact.to_json() | {"sources": sorted(fact.sources.values())} for tasks in asked_of for fact in tasks.facts
        ]
        rows = {"codec": CODEC, "new_tokens": given.new_tokens, "tasks": facts, "runs": runs}
        folder, dtype = Path(name), given.dtype
        models = {"base": cast(base, folder / "base", dtype)}
        compress(models["base"], cast(tuned, folder / "tuned", dtype), folder / "deltas" / TENANT, CODEC)
        models[TENANT] = apply_delta(models["base"], folder / "deltas" / TENANT, folder / "merged")
        with served(models["base"], folder / "deltas") as url:
            for arm in arms:
                for run in compared(url, arm, models[arm], dtype, given.asks, answers, choices):
                    runs.append(run)
                    print(json.dumps(run), record.save(saved, rows), flush=True)  # it takes long


def cast(source: Path, target: Path, dtype: str) -> Path:
    """A copy of a model in another dtype."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return target


@contextmanager
def served(base: Path, deltas: Path) -> Iterator[str]:
    """Address of `deltakeeper serve`, which ends with the block."""
    words = [sys.executable, "-m", "deltakeeper", "serve", "--base", str(base), "--deltas", str(deltas)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*words, "--name", "base", "--port", "0", "--threads", "1"], stderr=log)
        try:
            end = time.monotonic() + START_SECONDS
            while " on http://" not in (said := _read(log)):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the service did not start: {said}")
                time.sleep(0.2)
            yield said.partition(" on ")[2].split()[0]
        finally:
            process.terminate()
            process.wait(60)


def _read(log: Any) -> str:
    log.seek(0)
    return log.read()


def compared(
    url: str, arm: str, path: Path, dtype: str, asks: Sequence[str], answers: Prepared, choices: Prepared
) -> Iterator[dict[str, Any]]:
    """One arm, asked over HTTP and in this process, in one way of `ASKS` after another."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    here = HFLM(pretrained=str(path), dtype=dtype, device="cpu", batch_size=4, max_length=CONTEXT)
    shared = {"model": arm, "num_concurrent": 4, "max_length": CONTEXT + 1, "timeout": 3600}
    plain = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", tokenizer=str(path), tokenizer_backend="huggingface", batch_size=4, **shared
    )
    chat = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", **shared)
    exact = None if dtype == "float32" else HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=4)
    ways = {
        "likelihoods": (choices, plain, False),
        "completions": (answers, plain, False),
        "chats": (answers, chat, True),
    }
    for tasks, remote, talk in (ways[ask] for ask in asks):
        (theirs, far), (ours, near) = (asked(model, tasks, talk) for model in (remote, here))
        name = next(iter(tasks.loaded["tasks"]))
        run = {"dtype": dtype, "arm": arm, "task": name, "client": _client(remote), "items": len(ours)}
        run |= {"seconds": {"http": far, "in process": near}}
        run |= {"scores": {"http": scores(theirs), "in process": scores(ours)}}
        run |= (answers_beside if tasks is answers else numbers_beside)(here, theirs, ours)
        if exact is not None and tasks is choices:
            run |= near_exact(rated(asked(exact, tasks, talk)[0]), rated(theirs), rated(ours))
        yield run


def _client(model: Any) -> str:
    return "local-chat-completions" if type(model).__name__ == "LocalChatCompletion" else "local-completions"


def asked(model: Any, tasks: Prepared, chat: bool) -> tuple[list[dict[str, Any]], float]:
    """Samples of lm-eval, by item, and the seconds that they took."""
    from lm_eval.evaluator import evaluate

    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    started = time.perf_counter()
    with quiet():
        found = evaluate(
            lm=model,
            task_dict=tasks.loaded,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    rows = next(iter(found["samples"].values()))
    return sorted(rows, key=lambda row: (row["doc_id"], row["filter"])), time.perf_counter() - started


def scores(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of each metric under each filter."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for metric in row["metrics"]:
            values.setdefault(f"{metric}, {row['filter']}", []).append(float(row[metric]))
    return {name: sum(found) / len(found) for name, found in values.items()}


def numbers_beside(here: Any, theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """How far log-likelihoods are apart, whole and by token of the continuation."""
    apart, by_token, greedy = [], [], 0
    for far, near in zip(theirs, ours, strict=True):
        for one, other, argument in zip(far["resps"], near["resps"], near["arguments"], strict=True):
            apart.append(abs(one[0][0] - other[0][0]))
            by_token.append(apart[-1] / len(here.tok_encode(argument[1])))
            greedy += one[0][1] == other[0][1]
    mean = sum(apart) / len(apart)
    numbers = {"numbers": len(apart), "worst": max(apart), "mean": mean, "worst_by_token": max(by_token)}
    chosen = sum(f["acc"] == n["acc"] for f, n in zip(theirs, ours, strict=True))
    return numbers | {"same_greedy": greedy, "same_choice": chosen}


def near_exact(exact: list[float], theirs: list[float], ours: list[float]) -> dict[str, dict[str, float]]:
    """How far both are on average from the same checkpoint computed in float32."""
    found = {"http": theirs, "in process": ours}
    return {
        "mean_from_float32": {
            way: sum(abs(a - b) for a, b in zip(exact, numbers, strict=True)) / len(exact)
            for way, numbers in found.items()
        }
    }


def rated(rows: list[dict[str, Any]]) -> list[float]:
    """All log-likelihoods, in order."""
    return [answer[0][0] for row in rows for answer in row["resps"]]


def answers_beside(here: Any, theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """How many answers are the same text, and where and how narrowly the others part."""
    first = {row["doc_id"]: (far, row) for far, row in zip(theirs, ours, strict=True)}  # filters share one answer
    parted = []
    for item, (far, near) in first.items():
        one, other = far["resps"][0][0], near["resps"][0][0]
        if one != other:
            parted.append({"item": item} | _parting(here, near["arguments"][0][0], one, other))
    return {"items": len(first), "same_answers": len(first) - len(parted), "parted": parted}


def _parting(here: Any, prompt: str, one: str, other: str) -> dict[str, Any]:
    """Where two answers part, and by how much the model in this process prefers its own next token."""
    first, second = (here.tok_encode(prompt + text) for text in (one, other))
    begun = len(here.tok_encode(prompt))
    place = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if place is None:
        return {"token": min(len(first), len(second)) - begun, "http": one[-20:], "in process": other[-20:]}
    with torch.inference_mode():
        logits = here.model(torch.tensor([second[:place]])).logits[0, -1].float()
    margin = float(logits[second[place]] - logits[first[place]])
    words = {"http": here.tok_decode([first[place]]), "in process": here.tok_decode([second[place]])}
    return {"token": place - begun, "margin": margin} | words


if __name__ == "__main__":
    main()
