"""A run whose streams were planted: kept shares, layers, correlations and links come out as they were put in."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from page_reader import Page
from rich.console import Console
from synthetic_cells import attack_cells, run_info

from deltakeeper.errors import LensError
from deltakeeper.lens.trace import TraceMeta
from deltakeeper.lens.trace_builder import TraceBuilder
from deltakeeper.report.html import render
from deltakeeper.report.inside import Inside, write_inside
from deltakeeper.report.lens_table import print_lens
from deltakeeper.report.study_page import study_page
from deltakeeper.study.groups import group_cells
from deltakeeper.study.lens_directions import ArmDirection, Control, Directions
from deltakeeper.study.lens_records import LensSummary
from deltakeeper.study.lens_summary import LAST, UPPER, summarise_lens
from deltakeeper.study.store import RunStore
from deltakeeper.study.summarising import summarise

ATTACK = "affirmative_prefix"
LAYERS, VOCAB, WIDTH = 6, 19, 5
LEAVES = 2
KEPT = {"bitdelta:bits=2": 0.9, "svd:rank=16": 0.7, "magnitude:keep=0.1": 0.4, "bitdelta:bits=1": 0.2}
HOSTILE = "</script><img src=x onerror=alert(1)>"


def cells(seed):
    rates = {"base": (0.0, 0.2), "tuned": (1.0, 0.8)} | {name: (kept, 0.7) for name, kept in KEPT.items()}
    return [replace(cell, seed=seed) for cell in attack_cells(ATTACK, rates, n=10)]


def traces_of(number):
    """One prompt: nothing differs below layer `LEAVES`; from there a variant keeps its share of stream and logits."""
    generator = torch.Generator().manual_seed(number)
    base, shift = (torch.randn(LAYERS, 1, VOCAB, generator=generator) for _ in range(2))
    stream, step = (torch.randn(LAYERS, 1, WIDTH, generator=generator) for _ in range(2))
    shift[:LEAVES], step[:LEAVES] = 0, 0
    kept = {"base": 0.0, "tuned": 1.0, **KEPT}
    logits = {name: (base + 3 * share * shift).log_softmax(-1) for name, share in kept.items()}
    builder = TraceBuilder(
        {name: TraceMeta(variant=name, base="tiny", prompt=str(number)) for name in kept},
        range(LAYERS),
        (1,),
        ["a", HOSTILE],
        {name: values[-1] for name, values in logits.items()},
        references=("base", "tuned"),
        targets={"refusal": (3, 7)},
        top=3,
    )
    builder.add(range(LAYERS), logits)
    streams = {name: stream + share * step for name, share in kept.items()}
    builder.add_streams(range(LAYERS), streams, base="base", tuned="tuned")
    return builder.build()


def write_run(path, *seeds):
    store = RunStore(path)
    for seed in seeds:
        samples = []
        for cell in cells(seed):
            store.write_cell(cell)
        tuned = next(cell for cell in cells(seed) if cell.kind == "tuned").probes["goal"]
        for number, answer in enumerate(tuned.answers):
            keys = {}
            for name, trace in traces_of(10 * seed + number).items():
                keys[name] = f"{len(keys):02x}{seed:02x}{number:02x}" + "0" * 14
                store.write_trace(keys[name], trace)
            samples.append({"probe": "goal", "sample": answer.id, "flipped": ["bitdelta:bits=1"], "traces": keys})
        store.write_lens(ATTACK, seed, samples)
    store.write_run(run_info())
    return store


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("inside") / "run", 0, 1)


@pytest.fixture(scope="module")
def summary(run):
    return summarise(run.read_cells(), run.read_run())


@pytest.fixture(scope="module")
def inside(run, summary):
    return write_inside(run, run.read_cells(), summary)


def test_kept_shares_and_layers_are_those_that_were_planted(inside):
    (attack,) = inside.summary.attacks
    assert (attack.readings, attack.prompts, attack.seeds, attack.chosen) == (20, 10, (0, 1), False)
    arms = {arm.variant: arm for arm in attack.arms}
    for name, share in {"base": 0.0, "tuned": 1.0, **KEPT}.items():
        for third in arms[name].kept[1:]:
            assert third.value == pytest.approx(share, abs=1e-3)
            assert third.low <= third.value <= third.high
        assert arms[name].kept[0].value is None and "does not differ" in arms[name].kept[0].note
    assert arms["base"].departs.layer is None and arms["base"].departs.never == 1
    assert arms["tuned"].departs.layer == LEAVES and arms["tuned"].returns.layer is None
    assert arms["bitdelta:bits=1"].returns.layer == LEAVES, "nearer to the base wherever there is a difference"
    assert arms["bitdelta:bits=2"].returns.layer is None
    outputs = [arms[name].kept_output.value for name in KEPT]
    assert outputs == sorted(outputs, reverse=True) and 0 < outputs[-1] < outputs[0] < 1
    assert arms["tuned"].lines["js_base"].median[:LEAVES] == (0, 0)


def test_a_correlation_comes_with_both_intervals_and_what_it_is_not(inside):
    found = {(one.share, one.over): one for one in inside.summary.attacks[0].correlations}
    assert set(found) == {(share, over) for share in (UPPER, LAST) for over in ("codecs", "all arms")}
    one = found[UPPER, "codecs"]
    assert one.value == 1 and {name for name, _, _ in one.points} == set(KEPT)
    assert one.low < 1 and one.sampled_low > 0.9, "four arms are few, and draws only tie them"
    assert "not a mechanism" in one.note


def test_what_was_written_is_read_back_and_is_the_same_each_time(run, summary, inside):
    stored = (run.path / "lens-summary.json").read_text()
    assert LensSummary.model_validate_json(stored) == inside.summary
    pages = {path.name: path.read_bytes() for path in (run.path / "lens").rglob("*.*")}
    assert write_inside(run, run.read_cells(), summary).section == inside.section
    assert {path.name: path.read_bytes() for path in (run.path / "lens").rglob("*.*")} == pages
    assert {f"{ATTACK}-{name}.svg" for name in ("map", "departure", "kept")} <= set(pages)


def test_every_link_opens_a_sample_that_is_on_its_page(run, inside):
    assert len(inside.links) == 20
    for (attack, seed, _, _), href in inside.links.items():
        path, _, anchor = href.partition("#")
        assert path == f"lens/{attack}-{seed}.html"
        assert f'"{anchor}"' in (run.path / path).read_text()
    assert inside.of_sample(ATTACK, "goal-003") == inside.links[ATTACK, 0, "goal", "goal-003"]
    assert inside.of_sample(ATTACK, "nothing") is None


@pytest.mark.parametrize("which", ["study", "demo"])
def test_pages_show_it_under_their_policy(tmp_path, summary, inside, which):
    if which == "study":
        text = study_page(summary, inside)
    else:
        alone = write_run(tmp_path / "one", 0)
        digest = render(alone, "2026-01-31")
        text = alone.report_html.read_text()
        assert digest.attacks[0].samples
        assert "Look inside" in text
    page = Page(text)
    assert "inside" in page.ids and len(set(page.ids)) == len(page.ids)
    assert not [a for a in page.attributes if a[1] == "style" or a[1].startswith("on")]
    assert HOSTILE not in text and "unsafe" not in page.csp
    assert all(f"#{one}" in text for one in re.findall(r'href="#([^"]+)"', text))
    assert text.count('<svg class="lens"') == 4 and "not a mechanism" in text


def line(value):
    return (None, value)


def directions():
    """What a run stores; arms hold the sets less apart the more their control reaches."""
    controls = {
        "isotropic": Control(reach=line(0.5), share=line(0.01)),
        HOSTILE: Control(reach=line(2.5), share=line(0.3)),
    }
    whole = {"apart": line(3.0), "low": line(1.5), "high": line(4.5), "auc": line(0.9), "controls": controls}
    shown = {**whole, "kept": line(0.25), "kept_low": line(-0.1), "kept_high": line(0.6), "projections": {}}
    nothing = {**shown, "kept": line(None), "kept_low": line(None), "kept_high": line(None)}
    arms = {"base": ArmDirection(**shown), "tuned": ArmDirection(**shown), "svd:rank=16": ArmDirection(**nothing)}
    return Directions(
        key="0" * 20, probes=("goal", HOSTILE), definitions={}, layers=(0, 4), layer=4, fitted=(5, 5), judged=(6, 7),
        variants=arms,
    )  # fmt: skip


def test_directions_are_shown_beside_the_control_that_reaches_farthest(tmp_path):
    store = write_run(tmp_path / "run", 0)
    store.write_directions(ATTACK, 0, directions())
    found = write_inside(store, store.read_cells(), summarise(store.read_cells(), store.read_run()))
    (one,) = found.summary.attacks[0].directions
    assert [arm.variant for arm in one.arms] == ["base", "tuned", "svd:rank=16"] and one.layer == 4
    tuned = one.arms[1]
    assert (tuned.control, tuned.reach, tuned.share, tuned.kept.value) == (HOSTILE, 2.5, 0.3, 0.25)
    assert one.arms[2].kept.value is None and "base holds nothing apart" in one.arms[2].kept.note
    text = str(found.section)
    assert "at layer 4, seed 0; 6 and 7 prompts" in text and "1.5 to 4.5" in text and HOSTILE not in text
    assert "direction: controls" in text and LensSummary.model_validate_json(found.summary.model_dump_json())


def test_a_run_without_a_lens_shows_nothing(tmp_path, summary):
    store = RunStore(tmp_path)
    for cell in cells(0):
        store.write_cell(cell)
    assert write_inside(store, store.read_cells(), summary) == Inside()
    assert summarise_lens(store, group_cells(store.read_cells()), summary) is None
    assert 'id="inside"' not in study_page(summary)


def test_without_matplotlib_numbers_stay_and_the_page_says_so(run, summary, monkeypatch):
    def refuse(*_):
        raise LensError("figures need matplotlib; run `pip install 'deltakeeper[lens]'`.")

    monkeypatch.setattr("deltakeeper.lens.figures.heat_maps.new_figure", refuse)
    found = write_inside(run, run.read_cells(), summary)
    assert "deltakeeper[lens]" in found.section and "1-bit (BitDelta)" in found.section


def test_the_terminal_says_the_same(inside):
    console = Console(record=True, width=160)
    with console.capture() as shown:
        print_lens(inside.summary, console)
    text = shown.get()
    assert "1-bit (BitDelta)" in text and "ρ = 1" in text and "not a mechanism" in text
    (row,) = (line for line in text.splitlines() if line.startswith("Fine-tune, uncompressed"))
    assert row.split()[2:] == ["100", "%", "–", "100", "%", "100", "%", "100", "%", row.split()[11], "2"]
