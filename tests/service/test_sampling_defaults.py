"""Where a request leaves sampling to the model, its `generation_config.json` says how tokens are drawn."""

from __future__ import annotations

import json
import logging

import pytest
from service_cases import PROMPT, opened_services, served, write_service

from deltakeeper.errors import DataError
from deltakeeper.service.app import build_app
from deltakeeper.service.sampling_defaults import SamplingDefaults, read_defaults
from deltakeeper.service.settings import ServiceSettings

GREEDY = {"temperature": 0.0, "eos_token_id": [], "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base that is greedy by its own file, and two tenants that say nothing so far."""
    folder = tmp_path_factory.mktemp("defaults")
    base = write_service(folder)
    (base / "generation_config.json").write_text(json.dumps(GREEDY))
    return folder


def answers(live, model, times=3, **asked):
    with live.client() as client:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, **asked}
        found = [client.post("/v1/completions", json=body) for _ in range(times)]
    return {answer.json()["choices"][0]["text"] if answer.is_success else answer.status_code for answer in found}


def test_what_is_left_out_is_what_the_models_file_says(folder):
    own = folder / "deltas" / "signs" / "generation_config.json"
    own.write_text(json.dumps({"temperature": 100.0, "top_k": 90, "unknown": {}, "top_p": None}))
    with opened_services(folder) as services, served(services) as live:
        assert answers(live, "base") == answers(live, "base", temperature=0) and len(answers(live, "base")) == 1
        assert len(answers(live, "ranks")) == 1  # the base's, since it has none of its own
        assert len(answers(live, "signs")) > 1
        assert len(answers(live, "signs", top_k=1)) == len(answers(live, "signs", temperature=0)) == 1
        assert len(answers(live, "base", temperature=100)) > 1


def test_none_is_openais_own_default(folder):
    (folder / "deltas" / "signs" / "generation_config.json").unlink(missing_ok=True)
    with (
        opened_services(folder, settings=ServiceSettings(generation_config="none")) as services,
        served(services) as live,
    ):
        assert len(answers(live, "base", times=6)) > 1


def test_a_tenants_file_that_cannot_be_meant_keeps_it_out_and_nobody_else(folder, caplog):
    caplog.set_level(logging.WARNING, "deltakeeper.service")
    (folder / "deltas" / "signs" / "generation_config.json").write_text('{"temperature": -1}')
    with opened_services(folder) as services, served(services) as live:
        assert answers(live, "signs") == {422} and len(answers(live, "ranks")) == 1
    assert "temperature" in caplog.text and "--generation-config none" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        '{"temperature": NaN}',
        '{"top_p": "0.9"}',
        '{"top_k": true}',
        '{"repetition_penalty": 0}',
        "[1]",
        "{",
        "[" * 9999,
    ],
)
def test_values_that_cannot_be_meant_are_refused_in_one_sentence(text, tmp_path):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(DataError) as error:
        read_defaults(tmp_path)
    assert "\n" not in str(error.value) and "generation_config.json" in str(error.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "generation_config.json").write_text(" " * (1 << 20) + "{}")
    with pytest.raises(DataError, match="larger than"):
        read_defaults(tmp_path)
    assert read_defaults(tmp_path / "nowhere") == SamplingDefaults()


def test_a_base_whose_file_cannot_be_meant_is_not_served(folder):
    file = folder / "base" / "generation_config.json"
    with opened_services(folder) as services:  # transformers reads it with other eyes
        file.write_text('{"top_p": 7}')
        with pytest.raises(DataError, match="top_p"):
            build_app(services)
    file.write_text(json.dumps(GREEDY))


def test_another_word_than_auto_and_none_is_refused():
    with pytest.raises(DataError, match="give auto or none"):
        ServiceSettings(generation_config="vllm")
