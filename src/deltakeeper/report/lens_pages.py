"""Pages on which a sample's lens is opened: one for each fine-tune, beside the index of its traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltakeeper.lens.page import PageTooLargeError, anchor_of, lens_page
from deltakeeper.lens.page_samples import LensSample
from deltakeeper.study.groups import Group
from deltakeeper.study.store import RunStore
from deltakeeper.whole_files import write_atomically

SampleKey = tuple[str, int, str, str]
"""Attack, seed, name of the probe, id of the prompt."""
MOST_SAMPLES = 24
"""On one page, those with flipped verdicts first."""
HELD, GONE = "attack succeeds", "no attack"


def write_pages(store: RunStore, groups: Sequence[Group]) -> dict[SampleKey, str]:
    """Write the page of every fine-tune that was looked into.

    Args:
        store: the run folder.
        groups: its attacks.

    Returns:
        For every sample that is on a page, its link from a page in the run folder.

    Raises:
        RunError: an index of traces is malformed.
        DataError: a trace is missing or malformed, or not even one sample fits a page.
    """
    links: dict[SampleKey, str] = {}
    for group in groups:
        for seed in group.seeds:
            entries = store.read_lens(group.attack, seed)[:MOST_SAMPLES]
            samples = {
                (group.attack, seed, entry["probe"], entry["sample"]): _sample(store, group, seed, entry)
                for entry in entries
            }
            if not samples:
                continue
            page = store.lens_page(group.attack, seed).relative_to(store.path).as_posix()
            title = f"Inside {group.attack.replace('_', ' ')}, seed {seed}"
            shown = _write(store, group, seed, title, samples)
            links |= {key: f"{page}#{anchor_of(samples[key].name)}" for key in shown}
    return links


def _sample(store: RunStore, group: Group, seed: int, entry: Mapping[str, Any]) -> LensSample:
    probe, id = entry["probe"], entry["sample"]
    traces = {arm: store.read_trace(key) for arm, key in entry["traces"].items()}
    measured = [arm for arm in traces if arm == group.base or seed in group.arms.get(arm, ())]
    answers = {
        arm: next(answer for answer in group.cell(arm, seed).probes[probe].answers if answer.id == id)
        for arm in measured
    }
    return LensSample(
        f"{probe} {id}",
        next(iter(answers.values())).prompt,
        list(traces.values()),
        {arm: HELD if answer.event else GONE for arm, answer in answers.items()},
        group.attack.replace("_", " "),
    )


def _write(
    store: RunStore, group: Group, seed: int, title: str, samples: Mapping[SampleKey, LensSample]
) -> list[SampleKey]:
    """Write as many of the samples as a page holds; gives those."""
    keys = list(samples)
    note = "All variants read the same tokens: the prompt, and behind it the base's own answer."
    while True:
        try:
            page = lens_page([samples[key] for key in keys], title=title, notes=[note])
        except PageTooLargeError:
            if len(keys) == 1:
                raise
            keys = keys[: len(keys) * 2 // 3]
            continue
        write_atomically(store.lens_page(group.attack, seed), page)
        return keys
