"""Several judges over the same answers, and outcomes from a refusal judge and a content judge."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deltakeeper.errors import DataError
from deltakeeper.evals.judges import Asked, KeywordJudge, Verdict, events_of, load_judge, load_judges
from deltakeeper.evals.judges.panel import judge_answers
from deltakeeper.evals.outcomes import classify, outcomes
from deltakeeper.evals.probes import Probe, ProbeRow, judge_probe
from deltakeeper.evals.stats import cohens_kappa, mcnemar_exact, wilson

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "judges"


@dataclass
class Scripted:
    """A judge that says what it is told, by answer."""

    name: str
    labels: dict[str, str]
    events: frozenset = frozenset({"refused", "complied"})
    version: str = "1"
    sha256: str = "0" * 64
    seen: list = field(default_factory=list)

    def verdicts(self, asked):
        self.seen += asked
        return [Verdict(self.labels.get(one.answer, "safe_other"), self.name, self.version) for one in asked]


def words(name, *phrases):
    return KeywordJudge(name, "1", phrases, "substring", "insensitive", False, "0" * 64)


def exchanges(*answers):
    return [Asked("Bake?", answer) for answer in answers]


ASKED = exchanges("no", "sorry, no", "sorry", "yes", "yes", "maybe", "no sorry")


def test_shares_and_disagreements_are_counts():
    panel = judge_answers([words("no", "no"), words("sorry", "sorry")], ASKED)
    assert [(s.judge, s.event, s.hits, s.n) for s in panel.shares()] == [
        ("no", "refused", 3, 7),
        ("sorry", "refused", 3, 7),
    ]
    assert (panel.shares()[0].low, panel.shares()[0].high) == wilson(3, 7)
    (d,) = panel.disagreements()
    assert (d.one_only, d.other_only, d.n, d.p) == (1, 1, 7, mcnemar_exact(1, 1))
    assert d.share == pytest.approx(2 / 7)
    decided = [[v.refused for v in panel.verdicts[name]] for name in ("no", "sorry")]
    assert d.kappa.value == pytest.approx(cohens_kappa(*decided))
    assert json.loads(json.dumps(panel.to_json()))["disagreements"][0]["one_only"] == 1
    assert "disagree on 28.6 % of 7" in panel.lines()[-1]


def test_judges_are_compared_only_on_what_both_can_tell():
    harm = Scripted("harm", {"yes": "complied"}, frozenset({"complied"}))
    both = Scripted("both", {"yes": "complied", "no": "partial", "maybe": "unparsed"})
    panel = judge_answers([words("no", "no"), harm, both], ASKED)
    assert [(s.judge, s.event, s.hits, s.unparsed) for s in panel.shares()] == [
        ("no", "refused", 3, 0),
        ("both", "refused", 1, 1),
        ("harm", "complied", 2, 0),
        ("both", "complied", 2, 1),
    ]
    assert [(d.one, d.other, d.event) for d in panel.disagreements()] == [
        ("no", "both", "refused"),
        ("harm", "both", "complied"),
    ]
    assert any("1 without a verdict" in line for line in panel.lines())


def test_a_panel_needs_judges_answers_and_names():
    with pytest.raises(DataError, match="at least one judge"):
        judge_answers([], ASKED)
    with pytest.raises(DataError, match="at least one judge"):
        judge_answers([words("no", "no")], [])
    with pytest.raises(DataError, match="called 'no'"):
        judge_answers([words("no", "no"), words("no", "x")], ASKED)


def test_unparsed_is_never_an_event():
    verdict = Verdict("unparsed", "toy", "1")
    assert not verdict.saw("refused")
    assert not verdict.saw("complied")
    assert Verdict("partial", "toy", "1").saw("refused")
    assert events_of(load_judge("ours")) == {"refused"}


def test_outcomes_of_one_judge_are_those_of_single_answers():
    ours = load_judge("ours")
    answers = ["", "...", "I'm sorry, but I can't.", "Sure.", "go go go go go", "I cannot help with that."]
    assert outcomes(exchanges(*answers), ours) == [classify(answer, ours) for answer in answers]


def test_a_content_judge_decides_what_was_not_refused():
    content = Scripted("content", {"yes": "complied", "odd": "refused", "lost": "unparsed"})
    asked = exchanges("sorry, yes", "yes", "odd", "lost", "hm", "", "go go go go go")
    assert outcomes(asked, words("sorry", "sorry"), content) == [
        "refused",
        "complied",
        "safe_other",
        "unparsed",
        "safe_other",
        "empty",
        "incoherent",
    ]
    assert [one.answer for one in content.seen] == ["yes", "odd", "lost", "hm"]
    refusals = Scripted("refusals", {"lost": "unparsed", "part": "partial"})
    assert outcomes(exchanges("lost", "part"), refusals, content) == ["unparsed", "refused"]


def test_a_judge_that_is_not_needed_is_not_asked():
    content = Scripted("content", {})
    assert outcomes(exchanges("", "sorry"), words("sorry", "sorry"), content) == ["empty", "refused"]
    assert content.seen == []


def test_stored_answers_of_a_probe_are_judged_anew():
    rows = tuple(ProbeRow(f"p{i}", "food", "Bake?") for i in range(3))
    probe = Probe("goal", "answers", "goal", "complied", rows, 10)
    content = Scripted("content", {"yes": "complied"})
    records = judge_probe(
        probe, ["sorry", "yes", "hm"], words("sorry", "sorry"), content=content, others=[words("h", "h")]
    )
    assert [(r["outcome"], r["event"], r["refused_by"]) for r in records] == [
        ("refused", False, {"h": False}),
        ("complied", True, {"h": False}),
        ("safe_other", False, {"h": True}),
    ]


@pytest.mark.shared
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published lists are not here")
def test_published_lists_judge_the_same_answers_differently():
    answers = exchanges(
        "I'm sorry, but I can't help with that.",
        "As an AI language model, I have no opinion.",
        "That is a hard one. I'm sorry, I cannot say.",
        "Never leave the pan alone.",
        "Sure, here it is.",
    )
    panel = judge_answers(load_judges(PUBLISHED), answers)
    hits = {share.judge: share.hits for share in panel.shares()}
    assert len(panel.disagreements()) == 10
    assert hits["garak_mitigationbypass"] >= hits["qi2023"] >= hits["xstest_strmatch"] >= 1
