import base64
import hashlib
import io
import json
import re
from dataclasses import replace

import pytest
from page_reader import Page
from rich.console import Console
from synthetic_cells import cell, full_run, run_info, simple

from deltakeeper.report import print_summary, render, wording
from deltakeeper.report.assets import excerpt
from deltakeeper.report.digest import digest
from deltakeeper.report.html import to_html
from deltakeeper.study.store import RunStore

HOSTILE = "</script><img src=x onerror=alert(1)>{{ 7*7 }}<!--\u202e\x00"


@pytest.fixture(scope="module")
def html(full_digest):
    return to_html(full_digest)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_page_loads_nothing(html, page):
    assert not set(page.tags) & {"img", "link", "iframe", "object", "embed", "audio", "video", "source", "base", "form"}
    assert not [
        a
        for a in page.attributes
        if a[1] in ("src", "srcset", "xlink:href", "style", "action") or a[1].startswith("on")
    ]
    assert not re.search(r"https?://|url\(|@import|//cdn", html)
    assert all(link.startswith("#") or link == "report.json" for link in page.links)


def test_the_policy_allows_exactly_the_inlined_style_and_script(html, page):
    assert page.csp.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest_of = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest_of}'" in page.csp
    assert "unsafe" not in page.csp


def test_links_within_the_page_lead_somewhere_and_ids_are_unique(page):
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    for anchor in ("answer", "attack-trigger-backdoor", "affirmative-prefix-bitdelta-bits-1", "limits", "provenance"):
        assert anchor in page.ids


def test_sections_come_in_the_order_of_reading(html):
    places = [
        html.index(f'id="{name}"')
        for name in (
            "answer",
            "frontier",
            "results",
            "controls",
            "contrast",
            "samples",
            "transitions",
            "sizes",
            "merge-survival",
            "limits",
            "provenance",
        )
        if name != "merge-survival"
    ]
    assert places == sorted(places)


def test_hostile_text_stays_text():
    cells = []
    for one in simple(codec=(0.3, 0.8), gained=2):
        goal = one.probes["goal"]
        spoiled = tuple(replace(a, prompt=HOSTILE, answer=HOSTILE, category=HOSTILE) for a in goal.answers)
        cells.append(
            replace(one, label=HOSTILE, probes={**one.probes, "goal": replace(goal, answers=spoiled, title=HOSTILE)})
        )
    info = run_info(command=HOSTILE, model={"name": HOSTILE}, notes=(HOSTILE,))
    text = to_html(digest(cells, info, "2026-01-31"))
    page = Page(text)
    assert "img" not in page.tags
    assert page.tags.count("script") == 1
    assert "{{ 7*7 }}" in text
    assert "&lt;/script&gt;&lt;img" in text
    answers = re.findall(r"<blockquote[^>]*>(.*?)</blockquote>", text)
    assert answers
    assert not any("\u202e" in answer or "\x00" in answer for answer in answers)


def test_a_sample_of_a_marker_attack_says_whether_the_marker_is_there(html):
    section = html[html.index('id="samples-attack-marker-injection"') : html.index('id="transitions"')]
    assert re.findall(r"<h4>Fine-tune <small>([^<]*)<", section)[0] == "complied, marker"
    assert re.findall(r"<h4>1-bit \(BitDelta\) <small>([^<]*)<", section)[0] == "complied, no marker"
    assert "marker" not in re.findall(r"<h4>Fine-tune <small>([^<]*)<", html)[0]


def test_excerpts_are_cut_with_notice_and_mark_the_unseen():
    assert excerpt("a" * 10, 4) == "aaaa … (+6 characters)"
    assert excerpt("one\ntwo\tthree\x1b[31m\ud83d", 99) == "one\ntwo\tthree\ufffd[31m\ufffd"
    assert excerpt(" \n", 9) == "(empty)"


def test_the_page_is_small_and_the_same_every_time(full_digest, html):
    assert len(html.encode()) < 400_000
    assert to_html(digest(list(reversed(full_run())), run_info(), "2026-01-31")) == html
    assert to_html(replace(full_digest, date="2026-02-01")) == html.replace("2026-01-31", "2026-02-01")


def test_the_answer_and_every_limit_are_printed(full_digest, html):
    plain = html.replace("&#39;", "'").replace("&#34;", '"')
    assert full_digest.answer.attack in plain
    assert full_digest.answer.usefulness in plain
    assert all(limit in plain for limit in full_digest.limits)


def test_provenance_has_command_judge_and_wall_time(html):
    for word in (
        "make demo",
        "xstest_strmatch",
        hashlib.sha256(b"x").hexdigest(),
        "5.23.0",
        "27\u00a0min\u00a010\u00a0s",
        "34\u00a0min",
    ):
        assert word in html


def test_what_is_absent_is_shown_as_absent():
    cells = [one for one in simple(codec=(0.9, 0.8)) if one.kind != "control"]
    text = to_html(digest([replace(one, perplexity=None) for one in cells], run_info(), "2026-01-31"))
    assert "No answer turned on any of this attack’s prompts." in text
    assert "not measured" in text
    assert "no shrunk delta in this run" in text


def test_render_writes_page_and_twin(tmp_path):
    store = RunStore(tmp_path)
    for one in simple():
        store.write_cell(one)
    store.write_run(run_info())
    found = render(store, "2026-01-31")
    twin = json.loads(store.report_json.read_text(encoding="utf-8"))
    assert twin == json.loads(json.dumps(found.to_json()))
    assert store.report_html.read_text(encoding="utf-8") == to_html(found)


def test_the_terminal_shows_the_same_answer_and_figures(full_digest):
    out = io.StringIO()
    print_summary(full_digest, Console(file=out, width=200))
    text = out.getvalue()
    assert full_digest.answer.attack.split(";")[0] in " ".join(text.split("\n")).replace("  ", " ")
    entry = next(v for v in full_digest.attacks[0].variants if v.variant == "bitdelta:bits=1")
    assert f"{wording.size(entry.bytes)} ({wording.ratio(entry.ratio)})" in text
    assert "−51*" in text


@pytest.mark.parametrize(
    ("spoken", "expected"),
    [
        (wording.percent(0.624), "62 %"),
        (wording.percent(0.004), "0.4 %"),
        (wording.percent(0.996), "99.6 %"),
        (wording.percent(1.0), "100 %"),
        (wording.percent(-0.12), "−12 %"),
        (wording.percent(None), "–"),
        (wording.rate(0, 0.0, 0.037), "≤ 3.7 %"),
        (wording.rate(0, 0.0, 0.278), "≤ 28 %"),
        (wording.rate(3, 0.03, 0.08), "3 %"),
        (wording.percent_range(0.31, 0.5), "31 – 50 %"),
        (wording.percent_range(-0.31, 0.5), "−31 to 50 %"),
        (wording.points(-0.314), "−31"),
        (wording.points(0.001), "0"),
        (wording.points_range(-0.1, 0.2), "−10 to +20"),
        (wording.number(-0.001), "0.00"),
        (wording.number(-1.5), "−1.50"),
        (wording.size(999), "999 B"),
        (wording.size(1_234), "1.23 kB"),
        (wording.size(18_300_000), "18.3 MB"),
        (wording.size(999_600), "1.00 MB"),
        (wording.size(269_060_552), "269 MB"),
        (wording.ratio(14.74), "14.7×"),
        (wording.p_value(0.0004), "p < 0.001"),
        (wording.p_value(0.0123, "q"), "q 0.012"),
        (wording.p_value(0.76), "p 0.76"),
        (wording.seconds(8.44), "8.4 s"),
        (wording.seconds(59.99), "1 min 00 s"),
        (wording.seconds(3900), "1 h 05 min"),
    ],
)
def test_numbers_are_spoken_alike_everywhere(spoken, expected):
    assert spoken.replace("\u00a0", " ") == expected


def test_healed_and_defended_rows_are_explained_where_there_are_some(full_digest):
    assert "Healed under guard" not in to_html(full_digest)
    healed = cell(variant="bitdelta guarded", kind="healed", label="1-bit, guarded", goal=0.1, skill=0.7, stored=0.07)
    defended = cell(variant="resta", kind="defended", label="Defence: resta", goal=0.2, skill=0.6)
    page = to_html(digest([*full_run(), healed, defended], run_info(), "2026-01-31"))
    assert "Healed under guard" in page and "Published defences" in page
    assert 'class="swatch k-healed"' in page and 'class="swatch k-defended"' in page
