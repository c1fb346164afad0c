"""Tables of benchmarks/service_load.py and service_soak.py: what HTTP costs, how long clients wait, an hour of it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from typing import Any

from .drawing import figures
from .tables import counted, table

OVERHEAD = """\
{requests} one-bit tenants of SmolLM2-135M are asked at once, prompts of {prompt} random tokens, {new} new tokens each,
greedy, the engine on {threads}; by turns the service (a process of its own, its client in another) and the engine alone
in process. Medians of {rounds}, ranges in brackets. The clock runs from the first request to the last byte. A ratio is
of one round. Load average at the end: {load}.
"""
WAITING = """\
The same tenants, prompts of {prompt} tokens and answers of {low} to {high}, streamed. *Closed*: {clients}, one for each
tenant, ask again as soon as they have their answer. *Open*: requests come by chance at {part} of the rate that the
closed loop got through, whoever is still waiting; before some of them their tenant was put out of memory (*cold*), and
its load is part of the wait. Seconds, as clients see them; load average at the end: {load}.
"""
FAIR = """\
Two tenants, {side} clients each, and room for {running} answers side by side. In every other window of {seconds} s the
second one asks {flood} times as often: past the quota that both keys have ({side} requests at a time), or without
quotas, where the engine's line alone decides. What the first tenant keeps is its tokens a second over those of the
window before. Load average at the end: {load}.
"""
SOAK = """\
`deltakeeper serve` with a policy and a canary over a tiny bfloat16 base; {tenants} tenants in four codecs, and memory
for a third of them. {clients} and {admins} asked, went away half-way, used foreign keys, sent what is no request,
replaced, unloaded, removed and brought back deltas for {minutes:g} minutes: {requests:,} requests, {loads:,} loads,
{evictions:,} deltas that left memory. What each tenant says to {cases} was recorded before, one request at a time, and
no two said the same; every answer and every piece of one was held to that.
"""


def load(rows: dict[str, Any]) -> str:
    """Markdown of throughput, waiting and shares; parts that were not measured are left out."""
    parts = []
    if "overhead" in rows:
        parts.append(_overhead(rows["overhead"], rows["workload"]))
    if "latency" in rows:
        parts.append(_waiting(rows["latency"]))
    if "fairness" in rows:
        parts.append(_fair(rows["fairness"]))
    return "\n".join(parts)


def soak(rows: dict[str, Any]) -> str:
    """Markdown of a soak: what came of the requests, what had to hold, and what the process held."""
    work, last = rows["workload"], rows["rests"][-1]
    text = SOAK.format(
        **{key: work[key] for key in ("tenants", "minutes")},
        clients=counted(work["clients"], "client"),
        admins=counted(work["admins"], "administrator"),
        cases=counted(work["known_answers"] // (work["tenants"] + 1), "prompt"),
        requests=sum(rows["requests"].values()),
        loads=last["loads"],
        evictions=sum(last["evictions"].values()),
    )
    held = "\n".join(f"- {name}: {'yes' if kept else '**no**'}" for name, kept in rows["passed"].items())
    memory = "; ".join(_grown(name, rows["memory"][field]) for field, name in _MEMORY if field in rows["memory"])
    first = rows["rests"][0]
    spread = [row["rss_mib"] for row in rows["minutes"] if row["seconds"] >= first["seconds"]]
    rests = (
        f"From the first rest on it was between {min(spread):.1f} and {max(spread):.1f} MiB.\n\nAt rest, "
        f"after {first['seconds'] / 60:.0f} and {last['seconds'] / 60:.0f} minutes: {first['files']} and "
        f"{last['files']} open files, {first['threads']} and {last['threads']} threads."
    )
    parts = [text, table(("what was asked", "what came, and how often"), _outcomes(rows["requests"])), held + "\n"]
    if rows["faults"]:
        distinct = {(kind, what): at for at, kind, what in reversed(rows["told"])}
        told = (
            f"- {kind}, first after {at / 60:.0f} minutes: {_inline(what)}" for (kind, what), at in distinct.items()
        )
        kinds = ", ".join(f"{kind} {count}" for kind, count in rows["faults"].items())
        parts.append(
            f"Faults: {kinds}. Of the first {len(rows['told'])}, each once:\n\n" + "\n".join(reversed([*told])) + "\n"
        )
    memory = f"Memory of the process, median of the second sixth of the time and of the last: {memory}. {rests}"
    return "\n".join([*parts, memory + "\n"])


def _inline(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


_MEMORY = (("rss_mib", "resident"), ("anonymous_mib", "of it anonymous"))


def _grown(name: str, found: dict[str, float]) -> str:
    return (
        f"{name} {found['early']:.1f} and {found['late']:.1f} MiB ({100 * found['growth']:+.2f} %; a straight line "
        f"through all since the first sixth: {found['mib_per_hour']:+.1f} MiB an hour)"
    )


def _outcomes(requests: dict[str, int]) -> Iterator[tuple[str, str]]:
    """A row for each kind of request; each way in which it ended, the commonest first."""
    kinds: dict[str, Counter[str]] = {}
    for key, count in requests.items():
        kind, _, outcome = key.rpartition(": ")
        kinds.setdefault(kind, Counter())[outcome] += count
    for kind, outcomes in kinds.items():
        yield f"`{kind}`" if "/" in kind else kind, "; ".join(f"{name} {n:,}" for name, n in outcomes.most_common())


def _overhead(found: dict[str, Any], work: dict[str, Any]) -> str:
    text = OVERHEAD.format(
        **{key: found[key] for key in ("requests", "prompt", "new")},
        threads=counted(work["threads"], "thread"),
        rounds=counted(found["rounds"], "round"),
        load=figures(found["load_average"]),
    )
    names = {"engine": "engine alone", "streams": "HTTP, streamed", "whole": "HTTP, in one piece"}
    rows = [
        (
            title,
            _ranged([row["tokens_s"] for row in found["contests"][name]]),
            _ranged(found["ratios"][name], 2) if name in found["ratios"] else "",
            *(_median(found["contests"][name], field) for field in ("service_cpu_s", "client_cpu_s", "seconds")),
        )
        for name, title in names.items()
    ]
    head = ("", "tokens/s", "over the engine alone", "service's CPU, s", "client's CPU, s", "seconds")
    return f"### What HTTP costs\n\n{text}\n{table(head, rows)}"


def _waiting(found: dict[str, Any]) -> str:
    text = WAITING.format(
        prompt=found["prompt"],
        low=found["new"][0],
        high=found["new"][1],
        clients=counted(found["closed"]["clients"], "client"),
        part=f"{100 * found['part']:.0f} %",
        load=figures(found["load_average"]),
    )
    opened = found["open"]
    at = f"{figures(opened['rate'])} requests/s"
    loops = ((f"closed, {figures(found['closed']['requests_s'])} requests/s", found["closed"]),)
    loops += tuple((f"open, {at}, {kind}", opened[kind]) for kind in ("warm", "cold"))
    rows = [
        (
            name,
            f"{one['requests']}" + (f" ({one['failed']} more failed)" if one["failed"] else ""),
            *(figures(one["first_token_s"][p]) for p in ("p50", "p95", "p99")),
            *(figures(one["between_tokens_s"][p]) for p in ("p50", "p95", "p99")),
        )
        for name, one in loops
        if one["requests"]
    ]
    head = ("loop", "requests", "first token, p50", "p95", "p99", "between tokens, p50", "p95", "p99")
    return f"### How long clients wait\n\n{text}\n{table(head, rows)}"


def _fair(found: dict[str, Any]) -> str:
    first = found["quotas"]["windows"][0]
    text = FAIR.format(
        side=found["side_by_side"],
        running=2 * found["side_by_side"],
        seconds=f"{first['seconds']:.0f}",
        flood=found["flood"],
        load=figures(found["load_average"]),
    )
    rows = []
    for name, title in (("quotas", "past its quota"), ("line", "without quotas")):
        windows = found[name]["windows"]
        calm, flooded = ([w for w in windows if w["flooded"] is kind] for kind in (False, True))
        refused = sum(w["other_statuses"].get("429", 0) for w in flooded)
        rows.append(
            (
                title,
                _ranged([w["quiet_tokens_s"] for w in calm]),
                _ranged([w["quiet_tokens_s"] for w in flooded]),
                _ranged(found[name]["ratios"], 2),
                " and ".join(_median([w["quiet_first_token_s"] for w in kind], "p95") for kind in (calm, flooded)),
                f"{sum(w['other_asked'] for w in flooded):,} ({refused:,} refused)",
            )
        )
    head = (
        "flood",
        "calm, tokens/s",
        "flooded, tokens/s",
        "kept",
        "first token p95, calm and flooded",
        "flood's requests",
    )
    return f"### Who keeps what in a flood\n\n{text}\n{table(head, rows)}"


def _ranged(values: list[float], digits: int | None = None) -> str:
    def told(value: float) -> str:
        return figures(value) if digits is None else f"{value:.{digits}f}"

    return f"{told(statistics.median(values))} ({told(min(values))} to {told(max(values))})"


def _median(rows: list[dict[str, float]], field: str) -> str:
    values = [row[field] for row in rows if field in row]
    return figures(statistics.median(values)) if values else ""
