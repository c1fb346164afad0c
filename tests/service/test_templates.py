"""Chat templates of strangers: they answer as transformers does, and neither stall others nor eat memory."""

from __future__ import annotations

import copy
import errno
import os
import resource
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from service_cases import OTHER_TEMPLATE, opened_services, served, write_service

from deltakeeper.live_base import open_base
from deltakeeper.service import templates
from deltakeeper.service.errors import Unavailable
from deltakeeper.service.settings import ServiceSettings
from deltakeeper.service.templates import TemplateEndedError, TemplateError, Templates
from deltakeeper.service.texts import Words

TURNS = [
    {"role": "user", "content": "w5 w6"},
    {"role": "assistant", "content": "w7"},
    {"role": "user", "content": "w8"},
]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"
HUGE = {
    "multiplied": "{{ 'a' * 10**9 }}",
    "padded": "{{ '%1000000000d' | format(1) }}",
    "powered": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "listed": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
}


@pytest.fixture(scope="module")
def base(service_folder):
    return open_base(service_folder / "base").tokenizer


@pytest.fixture
def rendering(base):
    made = Templates(base)
    yield made
    made.close()


def stranger(base, template):
    own = copy.copy(base)
    own.chat_template = template
    return own


def test_a_strangers_template_renders_as_in_transformers(base, rendering):
    template = OTHER_TEMPLATE + "{{ bos_token }}|{{ eos_token }}|{{ messages | tojson }}|{{ strftime_now('%Y')[:2] }}"
    own = stranger(base, template)
    assert rendering.trusts(base) and not rendering.trusts(own)
    wanted = own.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    assert rendering.render(own, TURNS) == wanted and "20" in wanted
    assert rendering.render(base, TURNS) == base.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)


def test_what_a_template_refuses_is_said_and_the_next_one_is_rendered(base, rendering):
    for template, says in {
        "{{ raise_exception('no such role') }}": "no such role",
        "{{ messages[9].content.x.y }}": "no element 9",
        "{% for %}": "Expected|unexpected",
        "{{ ''.__class__.__mro__ }}": "unsafe",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": ".",
        "{{ 'ab' * 600000 }}": "it writes 1,200,000 characters",
    }.items():
        with pytest.raises(TemplateError, match=says):
            rendering.render(stranger(base, template), TURNS)
    assert rendering.render(stranger(base, "w1"), TURNS) == "w1"


@pytest.mark.parametrize("template", HUGE.values(), ids=HUGE)
def test_a_template_that_wants_all_memory_gets_none_of_ours(base, rendering, template):
    before = resident()
    with pytest.raises(TemplateError, match=r"memory|too long|writes|exceeds"):
        rendering.render(stranger(base, template), TURNS)
    assert resident() - before < 64 << 20


def test_a_template_that_does_not_end_is_ended_and_then_not_tried_for_a_while(base, rendering, monkeypatch):
    own = stranger(base, LOOPS)
    with pytest.raises(TemplateError, match="it takes too long"):
        rendering.render(own, TURNS)
    began = time.perf_counter()
    with pytest.raises(TemplateError, match="took too long a moment ago"):
        rendering.render(own, TURNS)
    assert time.perf_counter() - began < 0.5
    clock = time.monotonic() + templates._PAUSE_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    with pytest.raises(TemplateError, match="it takes too long"):  # tried again, since its pause is over
        rendering.render(own, TURNS)


def test_a_template_that_speaks_of_memory_ends_no_process(base, rendering):
    """Another tenant's chat would have to wait for the start of the next."""
    rendering.render(stranger(base, "w1"), TURNS)
    before = set(rendering._running)
    for _ in range(2):
        with pytest.raises(TemplateError, match="no memory of that") as refused:
            rendering.render(stranger(base, "{{ raise_exception('no memory of that') }}"), TURNS)
        assert not isinstance(refused.value, TemplateEndedError)
    assert rendering._running == before


def test_a_template_that_took_too_much_memory_is_not_tried_for_a_while(base, rendering):
    own = stranger(base, HUGE["multiplied"])
    with pytest.raises(TemplateEndedError, match="it takes too much memory") as ended:
        rendering.render(own, TURNS)
    assert ended.value.retry_after == templates._PAUSE_SECONDS and not rendering._running
    with pytest.raises(TemplateEndedError, match="too much memory a moment ago") as paused:
        rendering.render(own, TURNS)
    assert 0 < paused.value.retry_after < templates._PAUSE_SECONDS and not rendering._running


def test_a_process_that_does_not_start_is_told_to_the_operator(base, rendering, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(templates, "_WORKER", tmp_path / "nowhere.py")
    for _ in range(3):  # no more than there are workers would also be found by one that is not given back
        with pytest.raises(TemplateError, match="cannot be rendered now"):
            rendering.render(stranger(base, "w1"), TURNS)
    assert "nowhere.py" in caplog.text and not rendering._running


def test_a_machine_without_room_for_a_process_is_told_to_ask_again(base, rendering, monkeypatch, caplog):
    words = Words(stranger(base, "w1"), templates=rendering)

    def full(*_, **__):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(templates.subprocess, "Popen", full)
        rendering.start()  # when the words of a tenant are read, which need no template yet
        for _ in range(3):  # no more than there are workers would also be found by one that is not given back
            with pytest.raises(Unavailable) as told:
                words.encode_chat(TURNS)
            assert (told.value.code, told.value.retry_after) == ("template_ended", templates._RESTART_SECONDS)
    assert "temporarily unavailable" in caplog.text
    assert words.encode_chat(TURNS) == words.encode("w1", special=False)


def test_a_service_with_a_thousand_open_streams_renders_too(base, rendering):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1100:
        pytest.skip("a process may not open so many files here")
    with ExitStack() as opened:
        for _ in range(1050):
            opened.enter_context(Path(os.devnull).open())
        assert rendering.render(stranger(base, OTHER_TEMPLATE), TURNS)


def test_no_process_is_left(base):
    made = Templates(base)
    made.render(stranger(base, "w1"), TURNS)
    [process] = made._running
    made.close()
    assert process.returncode is not None and not Path(f"/proc/{process.pid}").exists()


def test_hostile_tenants_stall_nobody(tmp_path):
    """An honest tenant is answered while as many hostile ones are as there were threads for all, or more."""
    write_service(tmp_path)
    folders = tmp_path / "deltas"
    (folders / "ranks").rename(folders / "honest")
    for number in range(6):
        copied = folders / f"hostile-{number}"
        copied.mkdir()
        for file in (folders / "signs").iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
        (copied / "chat_template.jinja").write_text(f"{LOOPS}w{number}")
    limits = ServiceSettings(encode_seconds=40)
    with opened_services(tmp_path, settings=limits) as services, served(services) as live:
        hostile, answers = [], []

        def ask(model, found):
            body = {"model": model, "messages": TURNS, "max_tokens": 1}
            with live.client() as client:
                found.append(client.post("/v1/chat/completions", json=body))

        ask("honest", answers)
        asking = [threading.Thread(target=ask, args=(f"hostile-{number}", hostile)) for number in range(6)]
        for thread in asking:
            thread.start()
        began = time.perf_counter()
        while any(thread.is_alive() for thread in asking) and len(answers) < 40:
            ask("honest", answers)
        assert len(answers) > 5 and (time.perf_counter() - began) / len(answers) < 2
        for thread in asking:
            thread.join(60)
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.status_code for answer in hostile} <= {400, 503}  # it took too long, or waited too long in line
        assert len(hostile) == 6


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
