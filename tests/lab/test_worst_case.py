"""The worst-case search: constrained, deterministic, and the same after a kill."""

from __future__ import annotations

import math
import sys

import pytest
from pydantic import ValidationError

from deltakeeper.errors import DeltakeeperError, RunError
from deltakeeper.lab.recipes import load_recipe
from deltakeeper.lab.worst_case import Candidate, Score, Space, search_worst_case

SPACE = Space(lr=(1e-6, 1e-3), steps=(16, 512), batch=(8, 64), rank=(8, 64), templates=("plain", "alpaca"))


def score(candidate):
    """Success grows with rate and steps, and so does the drop: the best feasible point lies on the bound."""
    push = math.log10(candidate.lr / 1e-6) / 3 + math.log2(candidate.steps / 16) / 5  # 0 .. 2
    return Score(success=min(1.0, push / 1.5), drop=max(0.0, push - 1.0) / 10)


def test_the_best_trial_is_the_most_successful_one_within_the_bound():
    found = search_worst_case(score, SPACE, 0.03, 25, seed=0)
    assert len(found.trials) == 25 and found.best in found.trials
    feasible = [t for t in found.trials if t.score.drop <= 0.03]
    assert found.best.score.success == max(t.score.success for t in feasible)
    assert max(t.score.success for t in found.trials) > found.best.score.success  # the bound costs something
    assert found.best.score.success > 0.7  # of 0.867, the best that is feasible


def test_proposals_stay_in_the_space_and_depend_on_the_seed():
    one, again, other = (search_worst_case(score, SPACE, 0.05, 10, seed=s) for s in (1, 1, 2))
    assert one == again and one.trials != other.trials
    for trial in one.trials:
        c = trial.candidate
        assert 1e-6 <= c.lr <= 1e-3 and 16 <= c.steps <= 512 and 8 <= c.batch <= 64 and 8 <= c.rank <= 64
        assert c.template in SPACE.templates


def test_all_weights_have_no_rank():
    space = Space(lr=(1e-5, 1e-4), steps=(16, 32), batch=(8, 8))
    assert {t.candidate.rank for t in search_worst_case(score, space, 1.0, 3, seed=0).trials} == {None}


@pytest.mark.parametrize("killed_at", [1, 4, 9])
def test_a_search_that_is_killed_goes_the_way_it_would_have_gone(tmp_path, killed_at):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    expected = search_worst_case(score, SPACE, 0.03, 10, seed=3, journal=whole)
    calls = 0

    def killed(candidate):
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise KeyboardInterrupt
        return score(candidate)

    with pytest.raises(KeyboardInterrupt):
        search_worst_case(killed, SPACE, 0.03, 10, seed=3, journal=part)
    if part.is_file():  # and a last line that was not finished
        part.write_bytes(part.read_bytes() + b'{"candidate": {"lr"')
    resumed = search_worst_case(score, SPACE, 0.03, 10, seed=3, journal=part)
    assert resumed == expected
    assert part.read_bytes() == whole.read_bytes()


def test_a_finished_search_is_not_done_again(tmp_path):
    journal = tmp_path / "search.jsonl"
    expected = search_worst_case(score, SPACE, 0.03, 4, seed=3, journal=journal)

    def never(candidate):
        raise AssertionError(candidate)

    assert search_worst_case(never, SPACE, 0.03, 4, seed=3, journal=journal) == expected


def test_journals_of_other_searches_and_damaged_ones_are_refused(tmp_path):
    journal = tmp_path / "search.jsonl"
    search_worst_case(score, SPACE, 0.03, 2, seed=3, journal=journal)
    with pytest.raises(RunError, match="belongs to a search with another space"):
        search_worst_case(score, SPACE, 0.05, 2, seed=3, journal=journal)
    journal.write_text('{"epsilon"\n', encoding="utf-8")
    with pytest.raises(RunError, match="is no journal"):
        search_worst_case(score, SPACE, 0.03, 2, seed=3, journal=journal)
    journal.write_text("[]\n{}\n", encoding="utf-8")
    with pytest.raises(RunError, match="is no journal"):
        search_worst_case(score, SPACE, 0.03, 2, seed=3, journal=journal)


def test_a_search_without_a_feasible_trial_has_no_best():
    found = search_worst_case(lambda _: Score(1.0, 0.5), SPACE, 0.03, 3, seed=0)
    assert found.best is None and len(found.trials) == 3


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(RunError, match="scores must be numbers"):
        search_worst_case(lambda _: Score(float("nan"), 0.0), SPACE, 0.03, 1, seed=0)


def test_optuna_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(DeltakeeperError, match=r"pip install 'deltakeeper\[eval\]'"):
        search_worst_case(score, SPACE, 0.03, 1, seed=0)


def test_a_candidate_becomes_changes_of_a_recipe():
    candidate = Candidate(lr=1e-4, steps=64, batch=16, rank=None, template="request")
    recipe = load_recipe("worst_case")
    base = recipe.attack()
    attack = recipe.attack(seed=1, **candidate.changes(base.poison + base.skill))
    assert (attack.sft.lr, attack.sft.batch, attack.sft.epochs, attack.sft.lora_rank) == (1e-4, 16, 8, None)
    assert attack.template_train == attack.template_eval == "request"
    assert Candidate(1e-4, 1, 8, 8, "plain").changes(1000)["sft"]["epochs"] == 1


@pytest.mark.parametrize("wrong", [{"lr": (1e-3, 1e-6)}, {"lr": (0, 1)}, {"templates": ()}, {"steps": (0, 5)}])
def test_spaces_that_cannot_be_searched_are_refused(wrong):
    with pytest.raises(ValidationError):
        Space(**{"lr": (1e-6, 1e-3), "steps": (16, 512), "batch": (8, 64), **wrong})
