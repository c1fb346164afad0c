"""A tenant whose artifact differs in its side files alone is answered with those of the version before it."""

from __future__ import annotations

import shutil

import pytest
from end_to_end_cases import engine_of, opened_store, service_of
from engine_cases import prompts_of

from deltakeeper.engine import Request

PROMPT = prompts_of(40, seed=8)[0]
LONG = 24


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = service_of("llama", tmp_path_factory.mktemp("made"), layers=1)
    service.tune("one", "bitdelta:bits=2", seed=0)
    return service


def edited(service, folder, stop):
    """The same weights with another end-of-text token."""
    shutil.copytree(service.tenants["one"].path, folder)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {stop}}}')
    return folder


def ask(engine):
    (answer,) = engine.generate([Request(PROMPT, tenant="a", max_new_tokens=LONG)])
    assert answer.error is None
    return list(answer.tokens)


def put(store, engine, path):
    done = store.replace("a", path)
    while not done.done():
        engine.step()


def test_a_swap_to_the_same_weights_with_another_end_of_text_stops_there(service, tmp_path):
    with opened_store(service) as (overlay, store), engine_of(overlay, store) as engine:
        store.register("a", service.tenants["one"].path)
        whole = ask(engine)
        first, second = whole[1], next(token for token in whole[2:] if token != whole[1])
        for number, stop in enumerate((first, second)):
            put(store, engine, edited(service, tmp_path / str(number), stop))
            assert ask(engine) == whole[: whole.index(stop) + 1]
