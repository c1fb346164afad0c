"""Prompts are read by turns among keys, and none may hand in more than its part."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from service_cases import PROMPT, FakeGate, opened_services, served, wait_until

from deltakeeper.service.access import Principal
from deltakeeper.service.errors import Unavailable
from deltakeeper.service.settings import ServiceSettings
from deltakeeper.service.texts import Words
from deltakeeper.service.turns import Turns

KEYS = {name: Principal(name, "tenant") for name in ("many", "few")}


class Plain:
    """A tokenizer of no words and no template."""

    def get_chat_template(self):
        return None

    def __call__(self, *_, **__):
        return {"input_ids": []}


def test_holders_go_round_and_each_has_its_own_order():
    async def play():
        turns, order = Turns(8), []

        async def use(holder, number):
            await turns.take(holder)
            order.append(f"{holder}{number}")
            await asyncio.sleep(0)
            turns.give()

        await asyncio.gather(*(use("a", n) for n in range(4)), *(use("b", n) for n in range(2)), use("c", 0))
        return turns, order

    turns, order = asyncio.run(play())
    assert order == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]
    assert not turns._taken and not turns._lines


def test_who_gives_up_loses_no_turn_of_another():
    async def play():
        turns = Turns(8)
        await turns.take("a")
        left, next_one, last = (asyncio.create_task(turns.take(name)) for name in ("b", "b", "c"))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        turns.give()  # to the other one of b,
        next_one.cancel()  # who goes before it knows
        await asyncio.wait([next_one, last])
        assert last.done() and not last.cancelled() and not turns._lines
        turns.give()
        await asyncio.wait_for(turns.take("d"), 1)

    asyncio.run(play())


@pytest.mark.parametrize("others", [(), ("b",), ("c",), ("b", "c")])
@pytest.mark.parametrize("first", ["cancel", "give"])
def test_an_end_and_a_turn_in_one_round_of_the_loop_lock_nobody_out(first, others):
    """A time-out cancels what is waited for at once, and whoever waits for it knows only in the loop's next round."""

    async def play():
        loop, turns, failures = asyncio.get_running_loop(), Turns(8), []
        loop.set_exception_handler(lambda _, context: failures.append(context))

        async def use(holder):
            await turns.take(holder)
            turns.give()

        await turns.take("a")
        ends = asyncio.create_task(turns.take("b"))
        await asyncio.sleep(0)
        stay = [asyncio.create_task(use(holder)) for holder in others]
        await asyncio.sleep(0)
        loop.call_soon(ends.cancel if first == "cancel" else turns.give)
        loop.call_soon(turns.give if first == "cancel" else ends.cancel)
        await asyncio.wait([ends])
        assert ends.cancelled()
        await asyncio.wait_for(asyncio.gather(*stay, turns.take("d")), 1)
        assert not turns._lines and not failures

    asyncio.run(play())


ACTIONS = st.one_of(
    st.tuples(st.just("take"), st.sampled_from("ab")),
    st.tuples(st.just("cancel"), st.integers(0, 5)),
    st.tuples(st.just("end"), st.none()),
    st.tuples(st.just("round"), st.none()),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTIONS, max_size=30))
def test_whatever_comes_in_one_round_a_turn_has_one_holder_and_none_is_lost(actions):
    async def play():
        loop, turns, failures, tasks = asyncio.get_running_loop(), Turns(3), [], []
        loop.set_exception_handler(lambda _, context: failures.append(context))
        holding = []

        async def use(holder, number):
            await turns.take(holder)
            holding.append(number)  # nothing is awaited in between, as in `Words.run`
            assert len(holding) == 1

        def end():
            if holding:
                holding.clear()
                turns.give()

        for action, what in actions:
            if action == "take":
                tasks.append(asyncio.create_task(use(what, len(tasks))))
            elif action == "cancel" and tasks:
                tasks[-1 - what % len(tasks)].cancel()
            elif action == "end":
                end()
            elif action == "round":
                await asyncio.sleep(0)
        for _ in range(3 * len(tasks) + 3):
            end()
            await asyncio.sleep(0)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(found is None or isinstance(found, asyncio.CancelledError | Unavailable) for found in ended)
        assert not failures and not turns._lines and not turns._taken

    asyncio.run(asyncio.wait_for(play(), 10))


@pytest.mark.parametrize("seconds", [0.05, 5.0])
def test_prompts_that_are_not_read_in_time_leave_the_model_to_the_next(seconds):
    """The end of the thread and the time-out meet in one round of a loop that was held up for longer than both."""

    async def play():
        failures, words = [], Words(Plain())
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        read = threading.Event()
        try:
            asked = [asyncio.create_task(words.run(None, at, read.wait, 10)) for at in (5.0, seconds, 5.0)]
            await asyncio.sleep(0.01)
            read.set()
            time.sleep(0.1)
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert [found[0], found[2]] == [True, True]
            assert found[1] is True if seconds == 5.0 else isinstance(found[1], Unavailable)
            assert await words.run(None, 5.0, read.wait, 10) and not failures
        finally:
            words.templates.close()

    asyncio.run(asyncio.wait_for(play(), 30))


def test_a_holder_that_hands_in_too_much_is_told_so_alone():
    async def play():
        turns = Turns(2)
        await turns.take("a")
        waiting = [asyncio.create_task(turns.take("a")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="2 requests of this key wait") as told:
            await turns.take("a")
        assert told.value.code == "queue_full" and told.value.retry_after
        other = asyncio.create_task(turns.take("b"))
        await asyncio.sleep(0)
        for task in (waiting[0], other, waiting[1]):
            turns.give()
            await asyncio.wait_for(task, 1)

    asyncio.run(play())


@pytest.mark.parametrize("path", ["completions", "chat/completions", "tokenize"])
def test_a_key_with_many_long_prompts_of_the_base_holds_others_up_for_one_of_them(service_folder, path):
    """What is slow is counted, not timed: how many prompts of the one are read before the other's."""
    asked = {"model": "base", "prompt": PROMPT}
    if path != "tokenize":
        asked["max_tokens"] = 1
    if path.startswith("chat"):
        asked["messages"] = [{"role": "user", "content": asked.pop("prompt")}]
    limits = ServiceSettings(max_unread=6)
    with (
        opened_services(service_folder, gate=FakeGate(dict(KEYS)), settings=limits) as services,
        served(services) as live,
    ):
        words, one_at_a_time, ended = live.server.config.app.state.texts.base, threading.Semaphore(0), []
        real = words.tokenizer

        class Slow:
            chat_template = real.chat_template

            def __getattr__(self, name):
                return getattr(real, name)

            def __call__(self, *arguments, **options):
                assert one_at_a_time.acquire(timeout=30)
                return real(*arguments, **options)

        def ask(key):
            with live.client(key) as client:
                answer = client.post(path if path == "tokenize" else f"/v1/{path}", json=asked)
                ended.append((key, answer.status_code))

        words.tokenizer = Slow()
        many = [threading.Thread(target=ask, args=("many",)) for _ in range(8)]
        for thread in many:
            thread.start()
        wait_until(lambda: ended == [("many", 503)])  # one is read, six wait, and the eighth is one too many
        few = threading.Thread(target=ask, args=("few",))
        few.start()
        wait_until(lambda: "few" in words._turns._lines)
        for _ in range(3):
            one_at_a_time.release()
        few.join(30)
        assert ("few", 200) in ended and ended.count(("many", 200)) <= 2
        for _ in range(8):
            one_at_a_time.release()
        for thread in many:
            thread.join(30)
        assert ended.count(("many", 200)) == 7
