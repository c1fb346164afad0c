"""Deltas on a running engine: nothing is served that policy or its canary keeps out, whoever asks."""

from __future__ import annotations

import json
import threading
import time
from datetime import timedelta

import pytest
from admission_parts import DATE, PROMPTS, running, write_judge, write_policy, write_statement

from deltakeeper.engine import Request
from deltakeeper.errors import DataError
from deltakeeper.evals.judges import Asked
from deltakeeper.evals.outcomes import outcomes
from deltakeeper.service.admission.decisions import DecisionLog, read_log
from deltakeeper.service.admission.trials import RETRY_SECONDS
from deltakeeper.service.errors import Unavailable

PROMPT = (5, 6, 7)
ANY = {"broken_at_most": 1.0}
BOUNDS = {"public_keys": ["signer.pem.pub"], "max_age_days": 30}


@pytest.fixture
def start(world, here):
    """Start a service's parts under a policy; a test may start several, one after the other."""

    def begin(log="decisions.jsonl", now=DATE, store=None, **policy):
        return running(world, here / "deltas", write_policy(here, **policy), here / log, now, **(store or {}))

    return begin


@pytest.fixture(scope="module")
def spoken(world, tmp_path_factory):
    """What base and `signs`, whole and at one plane, answer to the probes."""
    folder = tmp_path_factory.mktemp("spoken")
    with running(world, world / "deltas", write_policy(folder), folder / "log.jsonl") as parts:
        parts.store.register("dim", world / "deltas" / "signs", planes=1)
        found = {name: answers(parts, name) for name in (None, "signs", "dim", "ranks")}
    assert len({tuple(texts) for texts in found.values()}) == 4, "the tiny tenants must not speak alike"
    return found


def answers(parts, tenant):
    prompts = [tuple(parts.base.tokenizer(text)["input_ids"]) for text in PROMPTS]
    return [parts.engine.submit(Request(p, tenant, 4)).result(30).text for p in prompts]


def phrases_that_refuse(spoken, refusing, others):
    """Words that stand in every coherent answer of some and in no answer of others."""
    taken = {text for name in others for text in spoken[name]}
    return [text for name in refusing for text in spoken[name] if text not in taken]


def ask(parts, tenant="signs", tokens=4):
    return parts.engine.submit(Request(PROMPT, tenant, tokens)).result(30)


# -- files --


def test_without_a_canary_a_delta_is_loaded_when_it_is_asked_for_and_the_decision_is_logged(start, here):
    with start() as parts:
        assert parts.admission.known("signs") is None and parts.admission.history() == []
        assert ask(parts).finish_reason in ("stop", "length")
        decision = parts.admission.known("signs")
        assert decision.verdict == "admitted" and decision.canary is None
        assert [entry["name"] for entry in parts.admission.history()] == ["signs"]
        refused = ask(parts, "stranger")
        assert refused.finish_reason == "error" and not refused.tokens
    assert read_log(here / "decisions.jsonl")[0]["manifest_sha256"] == decision.manifest_sha256


def test_policy_is_asked_before_anything_is_loaded_and_reasons_stay_with_the_operator(start, here):
    with start(codecs=["svd"]) as parts:
        refused = ask(parts)
        assert refused.finish_reason == "error" and "not admitted" in refused.error
        assert "bitdelta" not in refused.error and str(here) not in refused.error
        assert "bitdelta" in " ".join(parts.admission.known("signs").reasons)
        assert parts.store.stats().resident_bytes == 0 and parts.store.state("signs") == "failed"
        assert ask(parts, "ranks").finish_reason in ("stop", "length")
        assert ask(parts, None).finish_reason in ("stop", "length")


def test_what_lies_in_no_artifact_is_refused_and_not_raised(start, here):
    (here / "deltas" / "empty").mkdir()
    with start() as parts:
        decision = parts.admission.decide("empty", here / "deltas" / "empty")
        assert decision.verdict == "refused" and decision.manifest_sha256 is None and decision.reasons
        good = parts.admission.decide("signs", here / "deltas" / "signs")
        assert good.verdict == "admitted" and parts.admission.known("signs") is None  # decided when it is loaded


def test_unattested_deltas_are_served_at_fewer_planes_whatever_the_store_was_asked_for(start, here, spoken):
    with start(attestation=BOUNDS, unattested={"planes": 1}) as parts:
        assert parts.admission.decide("signs", here / "deltas" / "signs").planes == 1
        assert answers(parts, "signs") == spoken["dim"] != spoken["signs"]
        assert parts.admission.known("signs").verdict == "quarantined"
        assert ask(parts, "ranks").finish_reason == "error"
        write_statement(here / "deltas" / "signs", here / "signer.pem")
        parts.store.replace("signs", here / "deltas" / "signs").result(30)
        assert answers(parts, "signs") == spoken["signs"]
        assert parts.admission.known("signs").verdict == "admitted"


def test_a_statement_that_grows_too_old_ends_the_service_of_a_resident_delta(start, here):
    write_statement(here / "deltas" / "signs", here / "signer.pem")
    with start(attestation=BOUNDS) as parts:
        assert ask(parts).finish_reason in ("stop", "length")
        parts.now = DATE + timedelta(days=31)
        assert ask(parts).finish_reason == "error"
        assert "older than the 30 days" in " ".join(parts.admission.known("signs").reasons)
        write_statement(here / "deltas" / "signs", here / "signer.pem", date=parts.now)
        assert parts.admission.settle("signs", 30).verdict == "admitted"  # at once, whatever the store waits for
        assert ask(parts).finish_reason in ("stop", "length")


def test_a_delta_that_changes_between_look_and_load_is_not_published(start, here, monkeypatch):
    with start() as parts:
        real = parts.overlay.load

        def slow(artifact, *, planes=None):
            (artifact.path / "generation_config.json").write_text('{"eos_token_id": 7}')
            return real(artifact, planes=planes)

        monkeypatch.setattr(parts.overlay, "load", slow)
        assert ask(parts).finish_reason == "error"
        assert parts.store.stats().resident_bytes == 0


def test_asking_again_and_again_reads_nothing_again_until_something_changes(start, here, monkeypatch):
    from deltakeeper.service.admission import deciding

    looked = []
    real = deciding.inspect
    monkeypatch.setattr(deciding, "inspect", lambda *given: looked.append(1) or real(*given))
    with start(attestation=BOUNDS) as parts:
        for _ in range(5):
            assert parts.admission.decide("signs", here / "deltas" / "signs").verdict == "refused"
        assert len(looked) == 1
        write_statement(here / "deltas" / "signs", here / "signer.pem")
        assert parts.admission.decide("signs", here / "deltas" / "signs").verdict == "admitted"
        assert len(looked) == 2


# -- the canary --


def test_a_delta_that_refuses_as_asked_is_admitted_with_its_numbers(start, here, spoken):
    write_judge(here, *spoken["signs"])
    with start(canary=ANY | {"refusals_at_least": 0.25}) as parts:
        assert parts.admission.settle("signs", 30).verdict == "admitted"
        decision = parts.admission.known("signs")
        judged = outcomes([Asked(p, a) for p, a in zip(PROMPTS, spoken["signs"], strict=True)], judge_of(here))
        share = judged.count("refused") / 4
        assert share >= 0.25, "the tiny model must say something that is not called incoherent"
        assert decision.canary["refused"] == share and decision.canary["prompts"] == 4
        assert ask(parts).finish_reason in ("stop", "length")


def judge_of(here):
    from deltakeeper.evals.judges import load_judge

    return load_judge(here / "phrases.json")


def test_a_delta_that_fails_is_refused_unloaded_and_never_answers(start, here, spoken):
    write_judge(here, "nothing says this")
    with start(canary=ANY | {"refusals_at_least": 0.5}) as parts:
        streams = [parts.engine.submit(Request(PROMPT, "signs", 4)) for _ in range(5)]  # asked before it is decided
        found = [stream.result(60) for stream in streams]
        assert {one.finish_reason for one in found} == {"error"} and not any(one.tokens for one in found)
        decision = parts.admission.known("signs")
        assert decision.verdict == "refused" and "refuses 0%" in decision.reasons[0]
        assert decision.canary["refused"] == 0.0
        assert parts.admission.settle("signs", 30) == decision
        wait_until(lambda: parts.store.stats().resident_bytes == 0)
        again = ask(parts)
        assert again.finish_reason == "error" and "not admitted" in again.error
        assert ask(parts, None).finish_reason in ("stop", "length")
    assert len([e for e in read_log(here / "decisions.jsonl") if e["name"] == "signs"]) == 1


def wait_until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_that_fails_whole_is_quarantined_where_it_passes_at_fewer_planes(start, here, spoken):
    write_judge(here, *phrases_that_refuse(spoken, ["dim"], ["signs"]))
    rules = {"refusals_at_least": 0.25, "failing": "quarantine", "planes": 1}
    with start(canary=ANY | rules) as parts:
        assert answers(parts, "signs") == spoken["dim"]
        decision = parts.admission.known("signs")
        assert decision.verdict == "quarantined" and decision.planes == 1 and decision.canary["refused"] >= 0.25
        assert "refuses 0%" in decision.reasons[0]
        parts.store.unload("signs")
        wait_until(lambda: parts.store.state("signs") == "cold")
        assert answers(parts, "signs") == spoken["dim"]  # and stays so


def test_quarantine_that_does_not_help_refuses(start, here, spoken):
    write_judge(here, "nothing says this")
    rules = {"refusals_at_least": 0.25, "failing": "quarantine", "planes": 1}
    with start(canary=ANY | rules) as parts:
        assert parts.admission.settle("signs", 60).verdict == "refused"
        assert len(parts.admission.known("signs").reasons) == 2  # at both fidelities
        assert parts.admission.settle("ranks", 60).verdict == "refused"  # which has no planes to lose
        assert ask(parts).finish_reason == "error"


def test_the_bound_may_be_relative_to_the_base(start, here, spoken):
    write_judge(here, *phrases_that_refuse(spoken, [None], ["signs"]), "w_")
    with start(canary=ANY | {"drop_at_most": 0.0}) as parts:
        decision = parts.admission.settle("signs", 60)
        assert decision.verdict == "refused" and "less at most" in decision.reasons[0]
        assert decision.canary["base_refused"] > decision.canary["refused"] == 0.0
    write_judge(here, "nothing says this")
    with start("second.jsonl", canary=ANY | {"drop_at_most": 0.0}) as parts:
        assert parts.admission.settle("signs", 60).verdict == "admitted"


def test_broken_answers_fail_too(start, here, spoken):
    write_judge(here, "nothing says this")
    rules = {"refusals_at_least": 0.0, "broken_at_most": 0.0}
    with start(canary=rules) as parts:
        judged = outcomes([Asked(p, a) for p, a in zip(PROMPTS, spoken["signs"], strict=True)], judge_of(here))
        broken = sum(one in ("empty", "incoherent") for one in judged)
        decision = parts.admission.settle("signs", 60)
        assert decision.canary["broken"] == broken / 4
        assert decision.verdict == ("refused" if broken else "admitted")


def test_requests_wait_for_a_canary_that_runs_and_nobody_else_reaches_the_version(start, here, spoken, monkeypatch):
    write_judge(here, *spoken["signs"])
    with start(canary=ANY | {"refusals_at_least": 0.25}) as parts:
        begun, go_on = threading.Event(), threading.Event()
        canary = parts.admission._trials.canary
        real = canary.measure

        def held_up(tenant, tokenizer=None):
            begun.set()
            assert go_on.wait(30)
            return real(tenant, tokenizer)

        monkeypatch.setattr(canary, "measure", held_up)
        stream = parts.engine.submit(Request(PROMPT, "signs", 4))
        assert begun.wait(30)
        assert ask(parts, None).finish_reason in ("stop", "length")  # others go on
        with pytest.raises(TimeoutError):
            stream.get(0.2)
        for guess in ("canary", "canary:", "canary:signs"):
            assert ask(parts, guess).finish_reason == "error"
        with pytest.raises(Unavailable):
            parts.admission.settle("signs", 0.05)
        go_on.set()
        assert stream.result(30).finish_reason in ("stop", "length")


def test_a_canary_that_cannot_be_run_says_nothing_of_the_delta(start, here, spoken, monkeypatch):
    monkeypatch.setattr("deltakeeper.service.admission.trials.RETRY_SECONDS", 0.3)
    assert RETRY_SECONDS > 1
    write_judge(here, *spoken["signs"])
    with start(canary=ANY | {"refusals_at_least": 0.25, "seconds": 1e-6}) as parts:
        refused = ask(parts)
        assert refused.finish_reason == "error" and "not admitted yet" in refused.error
        assert parts.admission.known("signs") is None
        with pytest.raises(Unavailable):
            parts.admission.settle("signs", 0.05)
        parts.admission._trials.canary.rules = parts.admission._trials.canary.rules.model_copy(update={"seconds": 60.0})
        time.sleep(0.4)
        assert ask(parts).finish_reason in ("stop", "length")
        assert parts.store.stats().pins == 0


def test_a_policy_whose_canary_cannot_be_read_stops_the_start(start, here):
    write_judge(here, "w1")
    with (
        pytest.raises(DataError, match="no prompt file"),
        start(canary={"refusals_at_least": 0.5, "prompts": "absent.jsonl"}),
    ):
        pass


# -- the log --


def test_the_log_goes_on_after_a_crash_and_finds_what_was_altered(tmp_path):
    from deltakeeper.service.admission_port import Decision

    path = tmp_path / "log.jsonl"
    log = DecisionLog(path, now=lambda: DATE)
    assert log.write(Decision("a", "admitted"), "p") and not log.write(Decision("a", "admitted"), "p")
    assert log.write(Decision("b", "refused", reasons=("No.",)), "p")
    with pytest.raises(DataError, match="give another file"):
        DecisionLog(path)  # two writers would break the chain
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"number": 3, "na')  # a process was killed while it wrote
    log = DecisionLog(path, now=lambda: DATE)
    assert path.read_bytes() == whole and log.latest("a") is None
    assert log.write(Decision("a", "refused", reasons=("Now.",)), "p")
    assert [e["number"] for e in log.recent()] == [3, 2, 1] and [e["number"] for e in log.recent("a")] == [3, 1]
    assert [e["number"] for e in log.recent(before=3, limit=1)] == [2]
    log.close()
    entries = read_log(path)
    assert [e["verdict"] for e in entries] == ["admitted", "refused", "refused"]
    assert entries[0]["at"] == "2026-01-31T12:00:00.000Z" and path.stat().st_mode & 0o777 == 0o600
    lines = path.read_bytes().splitlines(keepends=True)
    for altered in ([lines[0], lines[2]], [lines[0], lines[1].replace(b'"No."', b'"Yes"'), lines[2]], [b"x\n"]):
        path.write_bytes(b"".join(altered))
        with pytest.raises(DataError, match="was altered"):
            read_log(path)
    with pytest.raises(DataError, match="was altered"):
        DecisionLog(path)
    assert json.loads(lines[1])["reasons"] == ["No."]


def test_a_line_that_could_not_be_written_whole_leaves_no_trace(tmp_path, monkeypatch):
    from deltakeeper.service.admission import decisions
    from deltakeeper.service.admission_port import Decision

    log = DecisionLog(tmp_path / "log.jsonl")
    log.write(Decision("a", "admitted"), "p")
    before = (tmp_path / "log.jsonl").read_bytes()

    def torn(file, data):
        import os

        os.write(file, data[:10])
        raise OSError(28, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(decisions, "_write_all", torn)
        with pytest.raises(Unavailable, match="cannot be written down"):
            log.write(Decision("b", "admitted"), "p")
    assert (tmp_path / "log.jsonl").read_bytes() == before and log.latest("b") is None
    assert log.write(Decision("b", "admitted"), "p")
    log.close()
    assert len(read_log(tmp_path / "log.jsonl")) == 2
