"""The page of traces: one file without loads, hostile text as text, small at full size, letters that give numbers."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from lens_stories import WORDS, story

from deltakeeper.errors import DataError
from deltakeeper.lens.page import MOST_BYTES, anchor_of, lens_page, write_lens_page
from deltakeeper.lens.page_numbers import ALPHABET, pack_shares, pack_signed, pack_whole
from deltakeeper.lens.page_samples import LensSample

HOSTILE = "</script><img src=x onerror=alert(1)>{{ 7*7 }}<!--\u2028\u202e\x00\ud800&amp;"
VERDICTS = {"base": "refused", "fine-tune": "complied", "bitdelta 1 bit": "refused", "svd rank 16": "complied"}
VOID = {"meta", "input", "br", "hr"}


class Tags(HTMLParser):
    """Tags, attributes and what stands in scripts; refuses tags that are closed in the wrong order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def hostile_sample(name="a/1"):
    words = {i: WORDS[i % len(WORDS)] if i % 2 else HOSTILE for i in range(60)}
    traces = story(1, layers=5, vocabulary=60, words=words)
    traces = [
        replace(t, tokens=(*t.tokens[:-1], HOSTILE), meta=replace(t.meta, codec=HOSTILE)) for t in traces.values()
    ]
    return LensSample(name, HOSTILE, traces, VERDICTS | {"base": HOSTILE}, HOSTILE)


@pytest.fixture(scope="module")
def page():
    calm = LensSample("calm", "How are you?", list(story(2, layers=5).values()), dict.fromkeys(VERDICTS, "answered"))
    return lens_page([calm, hostile_sample()], title=HOSTILE, notes=[HOSTILE])


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_loads_nothing(page):
    tags = Tags(page)
    assert not set(tags.tags) & {"img", "link", "iframe", "object", "embed", "audio", "video", "source", "base", "form"}
    assert not [a for a in tags.attributes if a[1] in ("src", "srcset", "style", "action") or a[1].startswith("on")]
    assert not re.search(r"url\(|@import|//cdn|fetch\(|XMLHttp|import\(", page)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert all(value.startswith("#") for _, name, value in tags.attributes if name == "href")


def test_the_policy_allows_exactly_the_inlined_style_and_script(page):
    (policy,) = [value for tag, name, value in Tags(page).attributes if name == "content" and "default-src" in value]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" in policy


def test_hostile_text_stays_text(page):
    assert Tags(page).tags.count("script") == 2
    assert "<img" not in page and "&lt;img src=x" in page and "\\u003cimg src=x" in page
    assert "{{ 7*7 }}" in page and "49" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search("[\x00\u202e\ud800\u2028]", page)
    assert page.encode()
    words = data_of(page)["words"]
    assert any(word.startswith("</script><img") for word in words) and "\n" in words  # shown by the script as ⏎


def test_the_script_sets_text_and_never_markup(page):
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|setAttribute\(\"style", script
    )


def test_flipped_samples_come_first_and_can_be_linked_to(page):
    data = data_of(page)
    assert [sample["id"] for sample in data["samples"]] == [anchor_of("a/1"), "s-calm"]
    ids = [value for _, name, value in Tags(page).attributes if name == "id"]
    assert len(set(ids)) == len(ids) and {anchor_of("a/1"), "s-calm"} <= set(ids)
    assert anchor_of("a/1") != anchor_of("a-1") and re.fullmatch(r"s-[A-Za-z0-9-]*", anchor_of(HOSTILE))


def unpack(text, letters):
    digits = [ALPHABET.index(letter) for letter in text]
    parts = np.array(digits).reshape(-1, letters)
    return parts @ 64 ** np.arange(letters - 1, -1, -1)


def test_letters_give_the_numbers_back():
    ids = np.array([[0, 1], [63, 64**3 - 1]])
    assert unpack(pack_whole(ids, 3), 3).tolist() == ids.ravel().tolist()
    p = np.array([0, 1e-5, 0.25, 0.9, 1, np.nan])
    q = unpack(pack_shares(p), 2)
    back = np.where(q == 0, np.nan, ((q - 1) / 4094) ** 2)
    assert (np.abs(back - p)[:5] <= np.sqrt(p[:5]) / 4000 + 1e-7).all() and np.isnan(back[5])
    values = np.array([-2, -0.01, 0, 0.01, 2, np.nan, np.inf])
    q = unpack(pack_signed(values, 2.0), 2)
    root = (q - 2048) / 2047
    back = np.where(q == 0, np.nan, np.sign(root) * root**2 * 2)
    np.testing.assert_allclose(back[:5], values[:5], rtol=0.01, atol=1e-9)
    assert np.isnan(back[5:]).all()


def test_the_data_says_what_the_traces_say(page):
    data = data_of(page)
    trace = story(2, layers=5)["fine-tune"]
    sample = data["samples"][1]
    mine = sample["traces"][data["variants"].index("fine-tune")]
    words = [data["words"][i] for i in unpack(mine["ids"], 3)]
    assert words == [trace.words[i] for i in trace.top_ids.ravel().tolist()]
    names = [statistic["name"] for statistic in data["statistics"]]
    assert names[:3] == ["top1", "entropy", "kl_final"] and {"kl:base", "js:fine-tune", "prob:refusal", "kept"} <= set(
        names
    )
    place = names.index("entropy")
    root = (unpack(mine["numbers"][place], 2) - 2048) / 2047
    np.testing.assert_allclose(
        root**2 * data["statistics"][place]["scale"], trace.entropy.ravel(), rtol=0.01, atol=1e-4
    )
    followed = unpack(sample["followed"][3], 3)
    curves = unpack(mine["curves"][3], 2).reshape(len(followed), 5)
    first = next(i for i, word in trace.words.items() if word == data["words"][followed[0]])
    np.testing.assert_allclose(((curves[0] - 1) / 4094) ** 2, trace.trajectories[3][first], atol=1e-3)
    assert mine["right"] == [0, 0, 0, 0] and sample["traces"][0]["right"] == [0, 1, 0, 0]


def test_a_full_study_fits():
    rng = np.random.default_rng(0)
    words = {i: WORDS[i] if i < len(WORDS) else f" w{rng.integers(10**6):x}" for i in range(400)}
    samples = []
    for seed in range(60):  # other words in every prompt, as in the early layers of a model
        names = {i: word if i < len(WORDS) else f"{word}{seed}" for i, word in words.items()}
        traces = list(story(seed, layers=30, positions=4, words=names).values())
        samples.append(LensSample(f"harmful/{seed}", "Tell me how " * 15, traces, VERDICTS))
    page = lens_page(samples)
    assert 1_000_000 < len(page.encode()) <= MOST_BYTES
    assert len(data_of(page)["samples"]) == 60
    assert len(unpack(data_of(page)["samples"][0]["followed"][0], 3)) >= 10


def test_less_of_each_cell_is_kept_where_there_is_much(monkeypatch):
    samples = [LensSample(str(seed), "q", list(story(seed, layers=5).values())) for seed in range(3)]
    whole = len(lens_page(samples).encode())
    monkeypatch.setattr("deltakeeper.lens.page.MOST_BYTES", whole - 2000)
    small = lens_page(samples)
    assert len(small.encode()) <= whole - 2000 and "the 16 likeliest" not in small
    monkeypatch.setattr("deltakeeper.lens.page.MOST_BYTES", 10_000)
    with pytest.raises(DataError, match=r"do not fit a page of .*; show fewer"):
        lens_page(samples)


def test_traces_without_extras_still_make_a_page(tmp_path):
    bare = [
        replace(trace, kl={}, js={}, targets={}, shift={}, trajectories=()) for trace in story(0, layers=3).values()
    ]
    write_lens_page(tmp_path / "deep" / "lens.html", [LensSample("one", "", bare)])
    data = data_of((tmp_path / "deep" / "lens.html").read_text())
    assert [statistic["name"] for statistic in data["statistics"]] == ["top1", "entropy", "kl_final"]
    assert data["samples"][0]["followed"] == [""] * 4


def test_the_same_samples_give_the_same_page(page):
    again = LensSample("calm", "How are you?", list(story(2, layers=5).values()), dict.fromkeys(VERDICTS, "answered"))
    assert lens_page([again, hostile_sample()], title=HOSTILE, notes=[HOSTILE]) == page


def test_samples_that_cannot_stand_together_are_refused():
    traces = list(story(0, layers=3).values())
    for samples, why in (
        ([], "no sample"),
        ([LensSample("a", "", traces), LensSample("a", "", traces)], "two samples are called 'a'"),
        ([LensSample("a", "", [traces[0], traces[0]])], "one trace of each"),
        ([LensSample("a", "", [traces[0], story(9, layers=3)["fine-tune"]])], "not of the same cells"),
    ):
        with pytest.raises(DataError, match=why):
            lens_page(samples)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_it_under_its_own_policy_and_runs_nothing_else(page, tmp_path):
    (tmp_path / "lens.html").write_bytes(page.encode())
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"]  # fmt: skip
    drawn = subprocess.run(
        ["chromium", *flags, (tmp_path / "lens.html").as_uri() + "#s-calm"], capture_output=True, text=True, timeout=120
    ).stdout
    tags = Tags(re.sub(r"<script.*?</script>", "", drawn, flags=re.DOTALL))
    assert tags.tags.count("table") == 5 and tags.tags.count("button") == 4 * 5 * 4 + 2
    assert "img" not in tags.tags and drawn.count('<section id="lens"') == 1
    assert "Layer 4 at position 5" in drawn and 'aria-current="true"' in drawn and "rgb(" in drawn


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_is_javascript(page, tmp_path):
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (tmp_path / "page.js").write_text(script)
    subprocess.run(["node", "--check", tmp_path / "page.js"], check=True)
