"""Streams across threads, and an engine that survives what goes wrong or says that it cannot."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from engine_cases import decode, prompts_of, settings_of

from deltakeeper.engine import Engine, EngineSettings, Request
from deltakeeper.engine.stream import Stream, Token
from deltakeeper.errors import EngineError
from deltakeeper.testing.models import build_model


@pytest.fixture
def model():
    return build_model("llama")


def test_many_threads_submit_and_read_at_once(model):
    prompts = prompts_of(*[6] * 12)
    expected = [tokens for prompt in prompts for tokens in decode(model, [prompt], 8)]
    answers = [None] * len(prompts)
    with Engine(model, None, settings=settings_of(max_running=4)) as engine:
        engine.start()

        def ask(i):
            stream = engine.submit(Request(prompts[i], max_new_tokens=8))
            answers[i] = [token.id for token in stream]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.alive
        assert [list(a.tokens) for a in engine.generate([Request(p, max_new_tokens=8) for p in prompts])] == expected
    assert answers == expected
    assert not engine.alive


def test_an_idle_engine_wakes_for_a_request_and_a_cancel(model):
    with Engine(model, None, settings=settings_of(max_context=64)) as engine:
        engine.start()
        time.sleep(0.05)
        stream = engine.submit(Request((5, 6), max_new_tokens=60, ignore_eos=True))
        assert isinstance(stream.get(timeout=30), Token)
        stream.cancel()
        answer = stream.result(timeout=30)
    assert answer.finish_reason in ("cancelled", "length")
    assert stream.times.submitted < stream.times.admitted < stream.times.first_token < stream.times.finished


def test_a_reader_can_wait_take_and_be_woken():
    woken = []
    stream = Stream("x", 3, wake=lambda: woken.append(1))
    with pytest.raises(TimeoutError):
        stream.get(timeout=0.01)
    stream.put(Token(1, "a", None))
    stream.put(Token(2, "b", None))
    assert [t.id for t in stream.take()] == [1, 2] and not stream.ended
    assert stream.take() == []
    stream.put(Token(3, "c", None))
    stream.end("stop", stop="d")
    stream.end("error", error="too late")
    assert [t.id for t in stream] == [3]
    assert stream.ended and stream.get() is None and stream.take() == []
    answer = stream.completion()
    assert (answer.text, answer.finish_reason, answer.stop, answer.error) == ("abc", "stop", "d", None)
    assert len(woken) == 4


def test_closing_ends_open_requests(model):
    engine = Engine(model, None, settings=settings_of())
    streams = [engine.submit(Request((5, 6), max_new_tokens=30)) for _ in range(3)]
    engine.step()
    late = engine.submit(Request((5,)))
    engine.close()
    assert [s.result().finish_reason for s in [*streams, late]] == ["cancelled"] * 4
    for use in (lambda: engine.submit(Request((5,))), engine.step):
        with pytest.raises(EngineError, match="clos"):
            use()


@pytest.mark.parametrize("threaded", [True, False])
def test_draining_finishes_what_is_there_and_takes_no_more(model, threaded):
    with Engine(model, None, settings=settings_of()) as engine:
        if threaded:
            engine.start()
        stream = engine.submit(Request((5, 6), max_new_tokens=30, ignore_eos=True))
        assert engine.drain(timeout=60)
        assert len(stream.completion().tokens) == 30
        with pytest.raises(EngineError, match="no more requests"):
            engine.submit(Request((5,)))


def break_forward(engine, when):
    """Make passes raise while `when(batch)` holds."""
    core, forward = engine._core, engine._forward

    class Broken:
        device = forward.device

        def __call__(self, batch):
            if when(batch):
                raise RuntimeError("out of luck")
            return forward(batch)

    core._forward = Broken()


def test_a_pass_that_raises_fails_its_requests_and_no_others(model):
    expected = decode(model, [(7, 8)], 5)[0]
    with Engine(model, None, settings=settings_of()) as engine:
        broken = engine.submit(Request((5, 6), max_new_tokens=5))
        break_forward(engine, lambda batch: True)
        engine.step()
        answer = broken.result()
        assert answer.finish_reason == "error" and "out of luck" in answer.error and broken.id in answer.error
        assert engine.stats().kv_blocks_used == 0
        break_forward(engine, lambda batch: False)
        assert list(engine.generate([Request((7, 8), max_new_tokens=5)])[0].tokens) == expected
        assert engine.stats().failed_steps == 1


def test_what_a_failed_pass_wrote_is_never_shared(model):
    prompt = prompts_of(40)[0]
    with Engine(model, None, settings=settings_of(max_step_tokens=20)) as engine:
        broken = engine.submit(Request(prompt, max_new_tokens=5))
        engine.step()
        break_forward(engine, lambda batch: True)
        engine.step()
        assert broken.result().finish_reason == "error"
        break_forward(engine, lambda batch: False)
        again = engine.generate([Request(prompt, max_new_tokens=5)])[0]
        assert again.cached_tokens == 16  # of the first chunk alone
    assert list(again.tokens) == decode(model, [prompt], 5)[0]


def test_an_engine_that_fails_again_and_again_says_that_it_is_dead(model):
    with Engine(model, None, settings=settings_of(max_running=1)) as engine:
        break_forward(engine, lambda batch: True)
        streams = [engine.submit(Request((5, 6))) for _ in range(20)]
        with pytest.raises(EngineError, match="passes failed in a row"):
            while engine.step():
                pass
        assert not engine.alive
        assert {s.result().finish_reason for s in streams} == {"error"}
        with pytest.raises(EngineError, match="has stopped"):
            engine.submit(Request((5,)))
        with pytest.raises(EngineError, match="has stopped"):
            engine.step()


def test_an_error_of_the_engines_own_ends_its_thread_and_every_request(model, monkeypatch):
    with Engine(model, None, settings=settings_of()) as engine:
        monkeypatch.setattr(engine._core.scheduler, "plan", lambda *_: 1 / 0)
        stream = engine.submit(Request((5, 6)))
        engine.start()
        answer = stream.result(timeout=30)
        assert answer.finish_reason == "error" and "division by zero" in answer.error
        assert not engine.alive


def test_weights_that_are_not_numbers_fail_the_request_alone(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
    expected = decode(model, [(5, 6, 7)], 6)[0]
    with Engine(model, None, settings=settings_of()) as engine:
        bad, good = engine.generate([Request((5, 9), max_new_tokens=6), Request((5, 6, 7), max_new_tokens=6)])
        assert bad.finish_reason == "error" and "not numbers" in bad.error
        assert list(good.tokens) == expected
        # the block that holds a NaN now goes to another request, whose tokens do not fill it
        assert list(engine.generate([Request((5, 6, 7), max_new_tokens=6)])[0].tokens) == expected


@pytest.mark.parametrize(
    "values", [{"kv_bytes": 0}, {"max_running": 0}, {"max_step_tokens": -1}, {"threads": 0}, {"max_context": 0}]
)
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(EngineError, match=next(iter(values))):
        EngineSettings(**values)


def test_a_cache_without_room_for_a_block_is_refused_and_the_model_given_back(model):
    before = model.config._attn_implementation
    with pytest.raises(EngineError, match="raise kv_bytes"):
        Engine(model, None, settings=EngineSettings(kv_bytes=100))
    assert model.config._attn_implementation == before


def test_threads_are_set_for_as_long_as_the_engine_lives(model):
    before = torch.get_num_threads()
    wanted = 2 if before == 1 else 1
    with Engine(model, None, settings=settings_of(threads=wanted)) as engine:
        engine.generate([Request((5,), max_new_tokens=1)])
        assert torch.get_num_threads() == wanted
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "values", [{"prompt": ()}, {"max_new_tokens": 0}, {"stop": ("a", "")}, {"prompt_logprobs": -1}]
)
def test_requests_out_of_range_are_refused(values):
    with pytest.raises(EngineError):
        Request(**{"prompt": (5,)} | values)


def test_counters_add_up(model):
    with Engine(model, None, settings=settings_of()) as engine:
        engine.generate([Request((5, 6, 7), max_new_tokens=4, ignore_eos=True) for _ in range(2)])
        stats = engine.stats()
    assert (stats.prompt_tokens, stats.answer_tokens, stats.computed_tokens) == (6, 8, 12)
    assert stats.finished == {"length": 2}
    assert stats.steps == len(stats.recent_steps) == 4
    assert 0 < stats.model_seconds < stats.step_seconds
    assert stats.kv_usage == 0
