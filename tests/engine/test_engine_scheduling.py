"""Who runs when: chunks, shared prefixes, preemption, cancelling, fairness, and nothing left behind."""

from __future__ import annotations

import functools

import pytest
import torch
from engine_cases import decode, prompts_of, reference, settings_of
from hypothesis import given, settings
from hypothesis import strategies as st

from deltakeeper.engine import Engine, QueueFullError, Request
from deltakeeper.engine.blocks import BLOCK
from deltakeeper.engine.line_room import LineRoom
from deltakeeper.engine.request import Sampling
from deltakeeper.engine.sequence import Sequence
from deltakeeper.engine.stream import Stream
from deltakeeper.engine.waiting import WaitingLine
from deltakeeper.errors import EngineError, TenantError
from deltakeeper.testing.models import build_model

LLAMA_BLOCK_BYTES = 2 * 2 * 2 * 12 * BLOCK * 4  # keys and values, layers, heads, width, tokens, float32


@functools.cache
def llama():
    return build_model("llama")


@functools.cache
def solo(prompt, new_tokens):
    """The answer of an engine that computes this prompt alone, in one chunk."""
    return decode(llama(), [prompt], new_tokens)[0]


@given(data=st.data())
@settings(max_examples=25)
def test_answers_do_not_depend_on_batch_mates(data):
    """Random arrivals, chunks and memory: every request is answered as if it were alone."""
    count = data.draw(st.integers(1, 7))
    lengths = data.draw(st.lists(st.sampled_from([1, 3, 15, 16, 17, 31, 45]), min_size=count, max_size=count))
    prompts = [prompts_of(length, seed=data.draw(st.integers(0, 2)))[0] for length in lengths]
    new = [data.draw(st.integers(1, 12)) for _ in prompts]
    arrivals = [data.draw(st.integers(0, 8)) for _ in prompts]
    owners = [data.draw(st.sampled_from("abc")) for _ in prompts]
    blocks = data.draw(st.sampled_from([4, 6, 12, 64]))
    limits = {
        "max_step_tokens": data.draw(st.sampled_from([1, 5, 16, 64, 256])),
        "max_running": data.draw(st.sampled_from([1, 2, 8])),
        "kv_bytes": blocks * LLAMA_BLOCK_BYTES,
        "prefix_sharing": data.draw(st.booleans()),
    }
    streams = {}
    with Engine(llama(), None, settings=settings_of(**limits)) as engine:
        assert engine.stats().kv_blocks == min(blocks, limits["max_running"] * 4)
        tick = 0
        while len(streams) < count or any(s.finish_reason is None for s in streams.values()):
            for i in range(count):
                if arrivals[i] == tick:
                    streams[i] = engine.submit(Request(prompts[i], max_new_tokens=new[i], owner=owners[i]))
            engine.step()
            tick += 1
            assert tick < 3000
        assert engine.stats().kv_blocks_used == 0
        assert engine.stats().running == engine.stats().waiting == 0
    for i in range(count):
        assert list(streams[i].result().tokens) == solo(prompts[i], new[i])


def test_a_shared_prefix_is_computed_once_and_answers_stay_the_same():
    prefix = prompts_of(40)[0]
    prompts = [prefix + tail for tail in prompts_of(3, 5, 1, seed=9)]
    expected = [solo(prompt, 6) for prompt in prompts]
    with Engine(llama(), None, settings=settings_of()) as engine:
        for i, prompt in enumerate(prompts):
            answer = engine.generate([Request(prompt, max_new_tokens=6)])[0]
            assert list(answer.tokens) == expected[i]
            assert answer.cached_tokens == (32 if i else 0)
        stats = engine.stats()
        assert (stats.prefix_queries, stats.prefix_hits) == (sum(map(len, prompts)), 64)
        assert stats.computed_tokens == sum(map(len, prompts)) - 64 + sum(map(len, expected)) - 3  # not the last ones
        assert stats.kv_blocks_cached >= 2
        salted = engine.generate([Request(prompts[0], max_new_tokens=6, cache_salt="other")])[0]
        assert salted.cached_tokens == 0
        assert list(salted.tokens) == expected[0]


def test_the_last_prompt_token_is_always_computed():
    prompt = prompts_of(2 * BLOCK)[0]
    with Engine(llama(), None, settings=settings_of()) as engine:
        first, second = (engine.generate([Request(prompt, max_new_tokens=4)])[0] for _ in range(2))
    assert second.cached_tokens == BLOCK
    assert second.tokens == first.tokens


def test_what_an_answer_left_in_the_cache_serves_the_next_turn():
    prompt = prompts_of(10)[0]
    with Engine(llama(), None, settings=settings_of()) as engine:
        answer = engine.generate([Request(prompt, max_new_tokens=30, ignore_eos=True)])[0]
        turn = prompt + answer.tokens + (5,)
        again = engine.generate([Request(turn, max_new_tokens=3)])[0]
    assert again.cached_tokens == 32
    assert list(again.tokens) == solo(turn, 3)


def test_without_blocks_the_younger_ones_are_computed_again():
    prompts = prompts_of(16, 16, 16, seed=4)
    limits = {"kv_bytes": 5 * LLAMA_BLOCK_BYTES}
    with Engine(llama(), None, settings=settings_of(**limits)) as engine:
        answers = engine.generate([Request(p, max_new_tokens=40, ignore_eos=True) for p in prompts])
        stats = engine.stats()
        assert stats.preemptions > 0
        assert stats.computed_tokens > sum(len(p) + 39 for p in prompts)
    assert [len(a.tokens) for a in answers] == [40, 40, 40]
    with Engine(llama(), None, settings=settings_of()) as engine:
        alone = engine.generate([Request(p, max_new_tokens=40, ignore_eos=True) for p in prompts])
        assert engine.stats().preemptions == 0
    assert [a.tokens for a in answers] == [a.tokens for a in alone]


def test_a_request_that_can_never_fit_is_refused_at_once():
    with Engine(llama(), None, settings=settings_of(kv_bytes=2 * LLAMA_BLOCK_BYTES)) as engine:
        with pytest.raises(EngineError, match="the KV cache holds 32"):
            engine.submit(Request((5,) * 10, max_new_tokens=24))
        answer = engine.generate([Request((5,) * 10, max_new_tokens=23, ignore_eos=True)])[0]
        assert len(answer.tokens) == 23
        with pytest.raises(EngineError, match="shorten the prompt"):
            engine.submit(Request((5,) * 32))


@pytest.mark.parametrize("tokens", [(5, 96), (-1,), (1 << 40,)])
def test_tokens_outside_the_vocabulary_are_refused(tokens):
    with Engine(llama(), None, settings=settings_of()) as engine, pytest.raises(EngineError, match="vocabulary"):
        engine.submit(Request(tokens))


def test_a_tenant_needs_a_store():
    with Engine(llama(), None, settings=settings_of()) as engine, pytest.raises(TenantError, match="base alone"):
        engine.submit(Request((5,), tenant="a"))


def test_the_line_is_bounded_in_requests_and_tokens():
    with Engine(llama(), None, settings=settings_of(max_waiting=3)) as engine:
        for owner in "aab":
            engine.submit(Request((5,), owner=owner))
        with pytest.raises(QueueFullError):
            engine.submit(Request((5,), owner="c"))
        engine.step()
        engine.submit(Request((5,)))
    with Engine(llama(), None, settings=settings_of(max_waiting_tokens=20)) as engine:
        engine.submit(Request((5,) * 30))  # alone, even a long one may wait
        with pytest.raises(QueueFullError):
            engine.submit(Request((5,)))
        assert len(engine.generate([Request((6,), max_new_tokens=2)])) == 1


def test_more_requests_than_may_wait_are_answered_in_order():
    prompts = prompts_of(*[4] * 12)
    with Engine(llama(), None, settings=settings_of(max_waiting=2, max_running=3)) as engine:
        answers = engine.generate([Request(p, max_new_tokens=3, id=str(i)) for i, p in enumerate(prompts)])
    assert [a.id for a in answers] == [str(i) for i in range(12)]
    assert [list(a.tokens) for a in answers] == [solo(p, 3) for p in prompts]


def test_cancelling_frees_everything_at_the_next_step():
    with Engine(llama(), None, settings=settings_of(max_step_tokens=8, max_running=2)) as engine:
        streams = [engine.submit(Request(p, max_new_tokens=30, ignore_eos=True)) for p in prompts_of(30, 3, 5, 5)]
        for _ in range(2):
            engine.step()
        assert engine.stats().kv_blocks_used > 0
        running, waiting = streams[0], streams[3]
        running.cancel()
        waiting.cancel()
        running.cancel()
        engine.step()
        assert running.finish_reason == waiting.finish_reason == "cancelled"
        streams[1].cancel()
        streams[2].cancel()
        engine.step()
        stats = engine.stats()
        assert stats.running == stats.waiting == stats.kv_blocks_used == 0
        assert stats.finished == {"cancelled": 4}
        late = engine.submit(Request((5,)))
        late.cancel()
        assert not engine.step()
        assert late.result().finish_reason == "cancelled"


def test_ten_thousand_requests_leave_nothing_behind():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    random = torch.Generator().manual_seed(0)
    limits = settings_of(kv_bytes=300 * 2 * 8 * BLOCK * 4, max_running=256, max_step_tokens=2048, max_waiting=20_000)
    with Engine(model, None, settings=limits) as engine:
        streams = []
        for length, new, cancel in torch.randint(1, 20, (10_000, 3), generator=random).tolist():
            hot = Sampling(temperature=1.0) if new % 5 == 0 else Sampling()
            streams.append(engine.submit(Request((length,) * length, max_new_tokens=min(new, 6), sampling=hot)))
            if cancel == 1:
                streams[-1 - len(streams) // 2].cancel()
            if len(streams) % 500 == 0:
                engine.step()
        while engine.step():
            pass
        stats = engine.stats()
        assert stats.kv_blocks == 300
        assert stats.running == stats.waiting == stats.kv_blocks_used == 0
        assert sum(stats.finished.values()) == 10_000
        assert stats.finished["cancelled"] > 100
        assert sorted(engine._core.scheduler._rows) == list(range(256))
        assert not engine._unfinished
    assert all(stream.finish_reason is not None for stream in streams)


def line_of(*tenants):
    line = WaitingLine(LineRoom(1000))
    for i, tenant in enumerate(tenants):
        push(line, Request((5,) * 10, tenant=tenant, id=f"{tenant}{i}"))
    return line


def push(line, request):
    line.room.enter(request.owner, len(request.prompt))
    sequence = Sequence(request, Stream(request.id, len(request.prompt)), 20)
    line.push(sequence)
    return sequence


def turns(line, count, cost=1.0):
    order = []
    for _ in range(count):
        sequence = line.next(())
        line.start(sequence)
        line.charge(sequence, cost)
        line.stop(sequence)
        order.append(sequence.request.tenant)
    return order


def test_a_tenant_with_many_requests_does_not_keep_others_waiting():
    line = line_of(*["greedy"] * 20, "modest", "modest")
    order = turns(line, 6)
    assert order.count("modest") == 2
    assert order.index("modest") < 2
    assert len(line) == line.room.requests == 16


def test_idling_saves_nothing_up():
    line = line_of("a", "a", "a", "a")
    turns(line, 3, cost=100.0)
    request = Request((5,), tenant="b")
    for _ in range(3):
        push(line, request)
    assert turns(line, 4).count("b") == 3  # b starts where a is, not a hundred tokens below
    line = line_of("a", "b")
    turns(line, 1, cost=50.0)
    assert line.next({"b"}) is None
    assert line.next(()).request.tenant == "b"


def test_first_come_first_served_within_a_tenant():
    line = line_of("a", "a", "a")
    first = line.next(())
    line.start(first)
    line.put_back(first)
    ids = []
    while (sequence := line.next(())) is not None:
        ids.append(sequence.request.id)
        line.remove(sequence)
    assert ids == ["a0", "a1", "a2"]


def test_a_long_prompt_does_not_stop_decoding():
    model = llama()
    with Engine(model, None, settings=settings_of(max_step_tokens=8)) as engine:
        decoding = engine.submit(Request((5, 6, 7), max_new_tokens=20, ignore_eos=True))
        engine.step()
        long = engine.submit(Request(prompts_of(50)[0], max_new_tokens=2))
        while long.times.first_token == 0:
            before = len(decoding.take())
            engine.step()
            assert before <= 1
            assert len(decoding.take()) == 1  # one token in each step, beside 7 of the prompt
        while engine.step():
            pass
    assert list(long.completion().tokens) == reference(model, prompts_of(50)[0], 2)
