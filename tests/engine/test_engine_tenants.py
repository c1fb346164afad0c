"""Many tenants in one engine: each answered as by its merged model, and nothing of one reaches another."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace

import pytest
import torch
from engine_cases import prompts_of, reference, settings_of

from deltakeeper.apply import apply_delta
from deltakeeper.artifact import open_artifact
from deltakeeper.compress import compress
from deltakeeper.engine import Engine, FixedTenants, Request, Sampling
from deltakeeper.engine import sequence as sequence_module
from deltakeeper.engine.store import TenantStore
from deltakeeper.errors import EngineError, TenantError
from deltakeeper.overlay import attach
from deltakeeper.testing import write_pair

PROMPT = prompts_of(40, seed=8)[0]
CODECS = {"a": "bitdelta:scale=row", "b": "svd:rank=8", "c": "bitdelta:bits=2"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base, tuned = write_pair("llama", folder, scale=0.05, dtype=torch.float32)
    for name, codec in CODECS.items():
        compress(base, tuned, folder / "deltas" / name, codec)
        apply_delta(base, folder / "deltas" / name, folder / "merged" / name)
    return folder


def load_model(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected(made):
    """Greedy answers to `PROMPT`, by tenant."""
    folders = {None: made / "base"} | {name: made / "merged" / name for name in CODECS}
    answers = {name: reference(load_model(path), PROMPT, 12) for name, path in folders.items()}
    assert len({tuple(a) for a in answers.values()}) == len(answers)
    return answers


@pytest.fixture
def overlay(made):
    overlay = attach(load_model(made / "base"))
    yield overlay
    overlay.detach()


@pytest.fixture
def fixed(overlay, made):
    deltas = {name: overlay.load(open_artifact(made / "deltas" / name)) for name in CODECS}
    return FixedTenants({name: (overlay.publish(delta), delta) for name, delta in deltas.items()})


def engine_of(overlay, store, **settings):
    return Engine(overlay.model, None, overlay=overlay, store=store, settings=settings_of(**settings))


def ask(engine, *tenants, prompt=PROMPT):
    answers = engine.generate([Request(prompt, tenant=tenant, max_new_tokens=12) for tenant in tenants])
    assert [answer.error for answer in answers] == [None] * len(tenants)
    return answers


@pytest.mark.parametrize("step", [1, 13, 64, 512])
def test_tenants_in_one_batch_are_answered_as_by_their_merged_models(overlay, fixed, expected, step):
    tenants = ["b", None, "a", "c", "a", None, "b"]
    with engine_of(overlay, fixed, max_step_tokens=step) as engine:
        answers = ask(engine, *tenants)
    assert [list(answer.tokens) for answer in answers] == [expected[tenant] for tenant in tenants]


def test_one_tenant_never_sees_anothers_keys(overlay, fixed, expected):
    for order in itertools.permutations(["a", "b", None]):
        with engine_of(overlay, fixed) as engine:
            for tenant in order:
                (answer,) = ask(engine, tenant)
                assert answer.cached_tokens == 0
                assert list(answer.tokens) == expected[tenant]
            for tenant in order:
                (answer,) = ask(engine, tenant)
                assert answer.cached_tokens == 32
                assert list(answer.tokens) == expected[tenant]


def test_the_seed_of_the_keys_is_what_keeps_tenants_apart(overlay, fixed, expected, monkeypatch):
    monkeypatch.setattr(sequence_module, "seed_key", lambda version, tenant, salt: b"same for all")
    with engine_of(overlay, fixed) as engine:
        ask(engine, "a")
        (answer,) = ask(engine, None)
    assert answer.cached_tokens == 32
    assert list(answer.tokens) != expected[None]


def test_versions_planes_and_names_of_one_artifact_share_nothing(overlay, made):
    path = made / "deltas" / "c"
    deltas = {
        "two planes": overlay.load(open_artifact(path)),
        "one plane": overlay.load(open_artifact(path), planes=1),
        "other name": overlay.load(open_artifact(path)),
    }
    assert deltas["two planes"].version == deltas["other name"].version != deltas["one plane"].version
    tenants = FixedTenants({name: (overlay.publish(delta), delta) for name, delta in deltas.items()})
    with engine_of(overlay, tenants) as engine:
        assert [ask(engine, name)[0].cached_tokens for name in deltas] == [0, 0, 0]


def test_sampled_rows_of_tenants_are_drawn_from_their_own_logits(overlay, fixed):
    hot = Sampling(temperature=1.0, seed=5, logprobs=0)
    with engine_of(overlay, fixed) as engine:
        request = [Request(PROMPT, tenant=t, max_new_tokens=12, sampling=hot) for t in ("a", None, "b")]
        together = engine.generate(request)
        alone = [engine.generate([r])[0] for r in request]
    assert [x.tokens for x in together] == [x.tokens for x in alone]
    assert len({x.tokens for x in together}) == 3


def test_an_unknown_tenant_is_told_and_others_run_on(overlay, fixed, expected):
    with engine_of(overlay, fixed) as engine:
        requests = [Request(PROMPT, tenant=tenant, max_new_tokens=12) for tenant in ("nobody", "a")]
        unknown, known = engine.generate(requests)
    assert unknown.finish_reason == "error" and "no tenant 'nobody'" in unknown.error
    assert list(known.tokens) == expected["a"]


@pytest.fixture
def store(overlay, made, tmp_path):
    deltas = shutil.copytree(made / "deltas", tmp_path / "deltas")
    root = open_artifact(deltas / "a").manifest.base.root
    with TenantStore(overlay, deltas, byte_budget=1 << 20, base_root=root) as store:
        store.scan()
        yield store


def test_cold_tenants_are_loaded_while_others_run(overlay, store, expected):
    with engine_of(overlay, store) as engine:
        base = engine.submit(Request(PROMPT, max_new_tokens=20, ignore_eos=True))
        cold = engine.submit(Request(PROMPT, tenant="a", max_new_tokens=12))
        engine.step()
        assert len(base.take()) == 1 and cold.take() == []
        while engine.step():
            pass
        assert list(cold.result().tokens) == expected["a"]
        assert [list(x.tokens) for x in ask(engine, "c", "b", None)] == [expected[t] for t in ("c", "b", None)]
    assert store.stats().pins == 0


def test_a_swap_reaches_new_requests_and_no_running_one(overlay, store, made, expected):
    with engine_of(overlay, store) as engine:
        ask(engine, "a")
        running = engine.submit(Request(PROMPT, tenant="a", max_new_tokens=12))
        for _ in range(3):
            engine.step()
        done = store.replace("a", made / "deltas" / "b")
        while not done.done():
            engine.step()
        while engine.step():
            pass
        (fresh,) = ask(engine, "a")
        assert list(running.result().tokens) == expected["a"]
        assert list(fresh.tokens) == expected["b"]
        assert fresh.cached_tokens == 0
    assert store.stats().pins == 0


def test_pins_are_released_however_a_request_ends(overlay, store):
    with engine_of(overlay, store) as engine:
        ask(engine, "a")
        streams = [engine.submit(Request(PROMPT, tenant="a", max_new_tokens=20)) for _ in range(4)]
        engine.step()
        assert store.stats().pins == 4
        streams[0].cancel()
        engine.step()
        assert store.stats().pins == 3
    assert store.stats().pins == 0  # closing has cancelled the rest


def test_a_token_that_only_another_tenant_knows_is_refused(overlay, fixed):
    with engine_of(overlay, fixed) as engine:
        (answer,) = engine.generate([Request((5, 96), tenant="a")])
    assert answer.finish_reason == "error" and "knows 96 tokens" in answer.error


def test_a_broken_tenant_fails_alone(overlay, fixed, expected):
    """A pass of several tenants that raises is computed again one by one, and only the culprit's requests fail."""
    with engine_of(overlay, fixed) as engine:
        forward = engine._forward
        culprit = fixed.acquire("b").slot

        class Broken:
            device = forward.device

            def __call__(self, batch):
                if culprit in batch.slots and len(engine._core.scheduler.running) > 1:
                    raise RuntimeError("out of luck")
                return forward(batch)

        engine._core._forward = Broken()
        requests = [Request(PROMPT, tenant=t, max_new_tokens=12) for t in ("a", "b", None)]
        first, broken, last = engine.generate(requests)
    assert broken.finish_reason == "error" and "out of luck" in broken.error
    assert list(first.tokens) == expected["a"]
    assert list(last.tokens) == expected[None]


class PanicException(BaseException):
    """What a library in Rust raises is no `Exception`."""


class Words:
    """A tokenizer that fails with its `failing`th text, if any."""

    def __init__(self, failing=None, error=None):
        self._left, self._error = failing, error

    def decode(self, ids, **settings):
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                raise self._error
        return " ".join(str(token) for token in ids)


def speaking(engine, fixed, **words):
    """Let the base and the tenants of an engine speak, some in words of their own."""
    sides, own = engine._sides, {fixed.acquire(name).version: tokenizer for name, tokenizer in words.items()}
    sides.base = replace(sides.base, tokenizer=Words())
    real = sides.get
    sides.get = lambda version, delta: replace(real(version, delta), tokenizer=own.get(version, Words()))


@pytest.mark.parametrize("error", [ValueError("out of luck"), PanicException("out of luck")], ids=["error", "panic"])
@pytest.mark.parametrize("failing", [1, 2, 7], ids=["admission", "first token", "later"])
def test_a_tokenizer_that_fails_ends_only_its_own_request(overlay, fixed, expected, failing, error):
    requests = [Request(PROMPT, tenant=tenant, max_new_tokens=12) for tenant in ("a", "b", None, "c")]
    with engine_of(overlay, fixed) as engine:
        speaking(engine, fixed)
        whole = engine.generate(requests)
    with engine_of(overlay, fixed, prefix_sharing=False) as engine:
        speaking(engine, fixed, b=Words(failing, error))
        engine.start()
        streams = [engine.submit(request) for request in requests]
        found = [stream.result() for stream in streams]
        again = engine.generate(requests[:1])
        assert engine.alive and engine.stats().kv_blocks_used == 0
    broken = found.pop(1)
    assert broken.finish_reason == "error" and "tenant" in broken.error and "out of luck" in broken.error
    assert whole.pop(1).tokens[: len(broken.tokens)] == broken.tokens
    assert [(one.tokens, one.text) for one in found] == [(one.tokens, one.text) for one in whole]
    assert list(again[0].tokens) == list(found[0].tokens) == expected["a"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [PanicException("out of luck"), GeneratorExit("out of luck")])
def test_a_thread_that_ends_leaves_nobody_waiting(overlay, fixed, error):
    def fail():
        raise error

    with engine_of(overlay, fixed) as engine:
        engine._core.step = fail
        stream = engine.submit(Request(PROMPT, max_new_tokens=12))
        engine.start()
        assert stream.get(timeout=10) is None
        answer = stream.completion()
        assert answer.finish_reason == "error" and "out of luck" in answer.error
        assert not engine.alive
        with pytest.raises(EngineError, match="out of luck"):
            engine.submit(Request(PROMPT))


def test_fixed_tenants_know_their_names(fixed):
    assert fixed.acquire("a").version != fixed.acquire("b").version
    with pytest.raises(TenantError, match="'z'"):
        fixed.acquire("z")
