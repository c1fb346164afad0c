"""Tables of benchmarks/service_lm_eval.py, lm-eval's clients beside lm-eval in process, and of service_crowd.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .drawing import figures
from .tables import counted, table

OPENING = """\
lm-eval asks `deltakeeper serve` with its own clients, and the merged checkpoint in its own process. The base is the
embedded model; the tenant is the aligned base as a delta, `{codec}`. Answers are greedy, of at most {new_tokens}
tokens, and count as the same if their texts are. Seconds are of one run beside other work, and no measure of speed.

Asked: {tasks}.
"""

ROUNDED = """\
In bfloat16 the two ways do not compute the same: the overlay adds a delta in float32 and rounds once where a merge
rounds `W + Δ`, kernels sum in another order, and logits in process have eight bits. So log-likelihoods differ in the
third digit, and an answer may go another way where two tokens are nearly tied. Neither is the truth: below is how far
both are from the merged checkpoint in float32, whose weights have the merge's rounding too.
"""

CROWD = """\
{users} users of locust {locust}, {spawn_rate} more each second until all are there, ask `deltakeeper serve` for
{seconds} s: SmolLM2-135M in bfloat16 and {tenants} one-bit tenants, one of them at random each time, the engine on
{threads}. Answers are greedy, of at most {tokens} tokens; between an answer and the next question a user waits half a
second to two. Of {requests} requests {failed} failed and {refused} were refused. Seconds, as locust rounds them, of a
streamed request to the head of its answer; the first token is the first with text. The service took {cpu} s of CPU time
beside other work, and the load average at the end was {load}.
"""


def crowd(rows: dict[str, Any]) -> str:
    """What locust's users saw, by kind of request; parts of streams are below the requests."""
    entries = sorted(rows["entries"], key=lambda entry: entry["method"] == "SSE")
    requests = [entry for entry in entries if entry["method"] != "SSE"]
    text = CROWD.format(
        **{**rows["workload"], "threads": counted(rows["workload"]["threads"], "thread")},
        requests=sum(entry["requests"] for entry in requests),
        failed=sum(entry["failed"] for entry in requests),
        refused=sum(entry["requests"] for entry in requests if " refused " in entry["name"]),
        cpu=figures(rows["service_cpu_s"]),
        load=figures(rows["load_average"]),
    )
    head = ("", "requests", "failed", "p50", "p95", "p99")
    return f"{text}\n{table(head, map(_seen, entries))}"


def _seen(entry: dict[str, Any]) -> tuple[str, ...]:
    name = entry["name"] if entry["method"] == "SSE" else f"`{entry['method']} {entry['name']}`"
    times = (figures(entry["seconds"][part]) for part in ("p50", "p95", "p99"))
    return name, f"{entry['requests']}", f"{entry['failed']}", *times


def lm_eval(rows: dict[str, Any]) -> str:
    """What came out the same, and by how little the rest did not."""
    shots = {fact["task"]: counted(fact["shots"], "shot") for fact in rows["tasks"]}
    tasks = "; ".join(f"{fact['items']} items of `{fact['task']}` ({shots[fact['task']]})" for fact in rows["tasks"])
    opening = OPENING.format(tasks=tasks, codec=rows["codec"], new_tokens=rows["new_tokens"])
    rated = [run for run in rows["runs"] if "numbers" in run]
    told = [run for run in rows["runs"] if "same_answers" in run]
    parts = [opening]
    if rated:
        head = (
            "log-likelihoods",
            "score, HTTP",
            "in process",
            "same choice",
            "numbers",
            "worst",
            "mean",
            "worst a token",
        )
        parts.append(table(head, map(_rated, rated)))
    if told:
        head = ("answers", "score, HTTP", "in process", "same answers", "seconds, HTTP", "in process")
        parts.append(table(head, map(_told, told)))
    if any(run["dtype"] == "bfloat16" for run in rows["runs"]):
        parts.append(ROUNDED)
        head = ("mean distance from the checkpoint computed in float32", "HTTP", "in process")
        parts.append(table(head, (_distances(run) for run in rated if "mean_from_float32" in run)))
    if parted := [line for run in told for line in _parted(run)]:
        head = ("answers that part", "item", "at token", "HTTP says", "in process", "margin in process")
        parts.append(
            "Where they part first, and by how many nats the model in process prefers its own token; two logits of 16 "
            "to 32 are at least 0.125 apart in bfloat16, or equal.\n\n" + table(head, parted)
        )
    return "\n".join(parts)


def _name(run: dict[str, Any]) -> str:
    return f"{run['dtype']}, {run['arm']}, `{run['client']}`"


def _scores(run: dict[str, Any]) -> Iterator[str]:
    for way in ("http", "in process"):
        yield ", ".join(f"{value:.3f}" for value in run["scores"][way].values())


def _rated(run: dict[str, Any]) -> tuple[str, ...]:
    same = f"{run['same_choice']} of {run['items']}"
    apart = (f"{run[key]:.1e}" for key in ("worst", "mean", "worst_by_token"))
    return _name(run), *_scores(run), same, f"{run['numbers']}", *apart


def _distances(run: dict[str, Any]) -> tuple[str, ...]:
    return _name(run), *(f"{run['mean_from_float32'][way]:.3f}" for way in ("http", "in process"))


def _told(run: dict[str, Any]) -> tuple[str, ...]:
    same = f"{run['same_answers']} of {run['items']}"
    return _name(run), *_scores(run), same, *(figures(run["seconds"][way]) for way in ("http", "in process"))


def _parted(run: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for one in run["parted"]:
        margin = f"{one['margin']:.3f}" if "margin" in one else "none: one ends"
        yield _name(run), f"{one['item']}", f"{one['token']}", _quoted(one["http"]), _quoted(one["in process"]), margin


def _quoted(text: str) -> str:
    return f"`{text!r}`".replace("|", "\\|")
