"""Tables and figure of benchmarks/serving.py: tokens a second and memory, ours and our peers'."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from .drawing import Bar, bar_chart, figures
from .tables import counted, table

OPENING = """\
Prompts of {prompt} random tokens, {new} new tokens each ({sampling}), {dtype}, {threads}; every contest in a process
of its own, in turns, {rounds} of {repeats} (those that take minutes: {slow}). Medians over rounds, ranges in brackets.
*Decode* are all tokens but the first of each request, over the time after the first; *whole* counts the reading of
prompts too; *first token* is a call for one token from all requests. Memory is of the process and its children.
Tenants are the base with random noise in one bit, adapters are random: the work and the bytes are those of
fine-tunes, the answers mean nothing.
"""

RATIOS = """\
Ours over theirs in the same round, for the same requests: above 1, ours gives more tokens a second.
"""

MODELS = {
    "smollm2-135m": "SmolLM2-135M",
    "llama-1b": "1.07 B parameters in the proportions of Llama-3.2-1B, random weights",
}
MB_OF_MIB = (1 << 20) / 1e6
DECODE, WHOLE = "decode_tokens_s", "tokens_s"


def tables(rows: dict[str, Any]) -> str:
    """All tables, for each model one of the contests and one of the ratios."""
    parts = [_opening(rows)]
    for model, contests in _models(rows):
        ran = [contest for contest in contests if WHOLE in contest]
        parts.append(f"### {MODELS.get(model, model)}\n")
        if ran:
            parts.append(_contests(ran))
        ratios = list(_ratios(ran))
        if ratios:
            head = ("ours", "beside", "decode, ratio", "range", "whole, ratio", "range", "rounds")
            parts.append(RATIOS + "\n" + table(head, ratios))
        missing = [contest for contest in contests if WHOLE not in contest]
        if missing:
            lines = (f"- {contest['name']}: {_reason(contest)}" for contest in missing)
            parts.append("Not measured:\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def figure(rows: dict[str, Any]) -> str:
    """Decoding speed of every contest that ran, those of one model and number of requests side by side."""
    groups: defaultdict[str, list[Bar]] = defaultdict(list)
    for model, contests in _models(rows):
        for contest in contests:
            if (value := contest.get(DECODE)) is not None:
                kind = 1 if contest["peer"] != "ours" else 2 if contest["tenants"] else 0
                name = f"{MODELS.get(model, model).partition(',')[0]}, {counted(contest['batch'], 'request')}"
                low, high = contest[f"{DECODE}_min"], contest[f"{DECODE}_max"]
                groups[name].append(Bar(contest["name"], value, low, high, kind))
    return bar_chart(list(groups.items()), title="Tokens a second while decoding, medians with ranges")


def _opening(rows: dict[str, Any]) -> str:
    work = rows["workload"]
    text = OPENING.format(
        prompt=work["prompt"],
        new=work["new"],
        sampling=work["sampling"],
        dtype=work["dtype"],
        threads=counted(work["threads"], "thread"),
        rounds=counted(work["rounds"], "round"),
        repeats=counted(work["repeats"], "timing"),
        slow=f"{counted(work['slow_rounds'], 'round')} of one",
    )
    versions = {pair for contest in rows["contests"] for pair in contest.get("versions", {}).items()}
    ours = next((contest["kernels"] for contest in rows["contests"] if "kernels" in contest), None)
    told = "; ".join(f"{name} {version}" for name, version in sorted(versions))
    kernels = "" if ours is None else f"; our kernels: {ours['isa'] or ours['name']}"
    load = rows["environment"]["load_average"][0]
    return f"{text}\n{told}{kernels}; load average at the end: {load:.1f}.\n"


def _models(rows: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for model in dict.fromkeys(contest["model"] for contest in rows["contests"]):
        yield model, [contest for contest in rows["contests"] if contest["model"] == model]


def _contests(contests: list[dict[str, Any]]) -> str:
    head = (
        "contest",
        "requests",
        "tenants",
        "decode, tokens/s",
        "whole, tokens/s",
        "first token, s",
        "peak, MiB",
        "a tenant, MB",
        "remark",
    )
    body = (
        (
            contest["name"],
            f"{contest['batch']}",
            f"{contest['tenants'] or 'base'}",
            _ranged(contest, DECODE),
            _ranged(contest, WHOLE),
            figures(contest["first_token_s"]),
            f"{contest['peak_rss_mib']:.0f}" if "peak_rss_mib" in contest else "",
            _tenant(contest),
            _remark(contest),
        )
        for contest in contests
    )
    return table(head, body)


def _ranged(contest: dict[str, Any], rate: str) -> str:
    if contest.get(rate) is None:
        return ""
    return f"{figures(contest[rate])} ({figures(contest[f'{rate}_min'])} to {figures(contest[f'{rate}_max'])})"


def _tenant(contest: dict[str, Any]) -> str:
    """Bytes that a tenant holds, and what the process grew by for each, where it is known."""
    if "bytes_per_tenant" not in contest:
        return ""
    held = figures(contest["bytes_per_tenant"] / 1e6)
    if "rss_with_tenants_mib" not in contest:
        return held
    grown = (contest["rss_with_tenants_mib"] - contest["rss_before_tenants_mib"]) / contest["tenants"] * MB_OF_MIB
    return f"{held} (process: {figures(grown)})"


def _remark(contest: dict[str, Any]) -> str:
    parts = [contest["remark"]] if contest["remark"] else []
    if "load_s_per_tenant" in contest:
        parts.append(f"loaded in {figures(contest['load_s_per_tenant'])} s each")
    if "failed_rounds" in contest:
        parts.append(f"failed in {counted(len(contest['failed_rounds']), 'round')}")
    return "; ".join(parts)


def _reason(contest: dict[str, Any]) -> str:
    if "absent" in contest:
        return f"absent, {contest['absent']}"
    return f"failed, {contest.get('failed', 'without a word')}"


def _ratios(contests: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Ours beside whatever answered the same requests; tenants also beside our base alone."""
    for ours in contests:
        if ours["peer"] != "ours":
            continue
        for theirs in contests:
            own_base = theirs["peer"] == "ours" and ours["tenants"] > 0 and theirs["tenants"] == 0
            rival = theirs["peer"] != "ours" and theirs["tenants"] == ours["tenants"]
            if ours["batch"] != theirs["batch"] or not (own_base or rival):
                continue
            decode, whole = _by_round(ours, theirs, DECODE), _by_round(ours, theirs, WHOLE)
            if whole:
                rounds = f"{len(whole)}"
                yield ours["name"], theirs["name"], *_middle(decode), *_middle(whole), rounds


def _by_round(ours: dict[str, Any], theirs: dict[str, Any], rate: str) -> list[float]:
    """Ratios of the rounds in which both ran; contests that take minutes have fewer."""
    pairs = zip(ours.get(f"{rate}_rounds", ()), theirs.get(f"{rate}_rounds", ()), strict=False)
    return [one / other for one, other in pairs if one is not None and other is not None]


def _middle(ratios: list[float]) -> tuple[str, str]:
    if not ratios:
        return "", ""
    return f"**{statistics.median(ratios):.2f}**", f"{min(ratios):.2f} to {max(ratios):.2f}"
