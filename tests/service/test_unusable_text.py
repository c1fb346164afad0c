"""A delta whose tokenizer, template or generation config fails is kept out for good; what may pass is tried again."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from types import SimpleNamespace

import pytest
from admission_parts import PROMPTS, error_of, serving
from service_cases import wait_until
from transformers import ByT5Tokenizer

from deltakeeper.errors import OversizedError, SideFileError, TenantError, UnreadableError
from deltakeeper.service import templates
from deltakeeper.service.admission import deciding
from deltakeeper.service.tenant_text import try_words
from deltakeeper.service.texts import Words
from deltakeeper.testing import write_tokenizer

LENIENT = {"refusals_at_least": 0.0, "broken_at_most": 1.0}
FAULTS = {
    "tokenizer": ("tokenizer.json", "{"),
    "template": ("chat_template.json", "["),
    "sampling": ("generation_config.json", '{"temperature": -1}'),
    "ends": ("generation_config.json", '{"eos_token_id": "x"}'),
}
STRIPS = [  # of a word in which nothing is left it takes a letter too many
    {"type": "Replace", "pattern": {"Regex": "[0-9]+"}, "content": "w"},
    {"type": "Strip", "content": "w", "start": 0, "stop": 9},
]
PANICS = {
    "decoder": {"decoder": {"type": "Sequence", "decoders": STRIPS}},
    "pre_tokenizer": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
}
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FAILING = "{{ raise_exception('no such role') }}"


def spoil(here, fault, name="signs"):
    file, text = FAULTS[fault]
    (here / "deltas" / name / file).write_text(text)
    return file


def reword(here, name="signs", **parts):
    """Give a delta a tokenizer of its own, with these parts in its file."""
    write_tokenizer(here / "deltas" / name)
    file = here / "deltas" / name / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))
    return file


def word(here, template, name="signs"):
    """Give a delta a chat template of its own."""
    (here / "deltas" / name / "chat_template.jinja").write_text(template)


def complete(parts, model="signs"):
    return parts.client.post("/v1/completions", json={"model": model, "prompt": "w1", "max_tokens": 2})


def listed(parts):
    return {card["id"] for card in parts.client.get("/v1/models").json()["data"]}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_cannot_be_used_are_422_with_the_reason_for_the_operator(world, here, fault):
    file = spoil(here, fault)
    with serving(world, here, admission=False) as parts:
        for _ in range(2):  # the second while the store waits
            asked = complete(parts)
            assert error_of(asked, 422)["code"] == "model_unusable" and "Retry-After" not in asked.headers
            assert file not in asked.text and str(here) not in asked.text
        card = parts.client.get("/admin/deltas/signs").json()
        assert card["unusable"] and card["state"] == "failed"
        assert ("tokenizer in" if fault == "tokenizer" else file) in card["reason"]
        assert "signs" not in listed(parts) and complete(parts, "ranks").status_code == 200
        assert parts.store.stats().resident_bytes == parts.store.stats().tenants["ranks"].resident_bytes


@pytest.mark.parametrize("panics", PANICS)
def test_a_tokenizer_that_panics_at_its_first_word_is_kept_out(world, here, panics):
    reword(here, **PANICS[panics])
    with serving(world, here, admission=False) as parts:
        assert error_of(complete(parts), 422)["code"] == "model_unusable"
        card = parts.client.get("/admin/deltas/signs").json()
        assert card["unusable"] and "tokenizer in" in card["reason"]
        assert complete(parts, "ranks").status_code == complete(parts, "base").status_code == 200


def test_a_tokenizer_without_text_for_a_token_that_its_model_may_say_is_kept_out(tmp_path):
    tokenizer = ByT5Tokenizer(extra_ids=0)  # it knows 259 tokens, and raises at any further one
    try_words(tokenizer, SimpleNamespace(side_folder=tmp_path, vocabulary=259))
    with pytest.raises(SideFileError, match="the tokenizer in"):
        try_words(tokenizer, SimpleNamespace(side_folder=tmp_path, vocabulary=260))


def test_a_prompt_that_only_its_own_tokenizer_does_not_take_is_422(world, here, caplog):
    file = reword(here)
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["unk_token"] = "<none>"
    file.write_text(json.dumps(tokenizer))
    with serving(world, here, admission=False) as parts:
        assert complete(parts).status_code == 200
        for route in ("/v1/completions", "/tokenize"):
            asked = parts.client.post(route, json={"model": "signs", "prompt": "w1 unheard"})
            assert error_of(asked, 422)["code"] == "model_unusable" and "Retry-After" not in asked.headers
            assert str(here) not in asked.text
        assert complete(parts).status_code == 200
    assert f"the tokenizer in {here / 'deltas' / 'signs'} cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("error", "raised"), [("panic", SideFileError), (ValueError("x"), SideFileError), (MemoryError(), TenantError)]
)
def test_every_use_of_a_tenants_own_words_says_whose_fault_it_is(tmp_path, error, raised):
    class PanicException(BaseException):
        pass

    error = PanicException("index out of bounds") if error == "panic" else error

    class Broken:
        chat_template = None

        def __call__(self, text, **settings):
            if text:
                raise error
            return {"input_ids": []}

        def decode(self, ids, **settings):
            raise error

        convert_ids_to_tokens = decode

    for folder, expected in ((tmp_path, raised), (None, type(error))):
        words = Words(Broken(), folder=folder)
        for use, given in ((words.encode, "w1"), (words.decode, [1]), (words.spell, [1]), (words.show, 1)):
            with pytest.raises(expected):
                use(given)


@pytest.mark.parametrize("fault", FAULTS)
def test_where_there_is_a_policy_a_decision_says_so(world, here, fault):
    spoil(here, fault)
    with serving(world, here) as parts:
        for _ in range(2):
            asked = complete(parts)
            assert error_of(asked, 422)["code"] == "not_admitted" and "Retry-After" not in asked.headers
        [entry] = parts.client.get("/admin/decisions", params={"name": "signs"}).json()["data"]
        assert entry["verdict"] == "refused" and entry["manifest_sha256"] and str(here) in entry["reasons"][-1]
        assert parts.client.get("/admin/deltas/signs").json()["unusable"]
        error_of(parts.client.put("/admin/deltas/signs"), 422)


def test_a_replacement_whose_words_fail_leaves_the_old_version_as_it_was(world, here):
    shutil.copytree(here / "deltas" / "signs", here / "deltas" / "worse")
    spoil(here, "tokenizer", "worse")
    with serving(world, here) as parts:
        assert complete(parts).status_code == 200
        put = parts.client.put("/admin/deltas/signs", json={"path": "worse", "replace": True})
        assert "the tokenizer in" in error_of(put, 422)["message"]
        assert complete(parts).status_code == 200 and "signs" in listed(parts)
        assert parts.client.get("/admin/deltas/signs").json()["decision"]["verdict"] == "admitted"


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
@pytest.mark.parametrize("admission", [True, False])
def test_what_the_machine_could_not_do_is_tried_again(world, here, monkeypatch, error, admission):
    from transformers import AutoTokenizer

    write_tokenizer(here / "deltas" / "signs")
    with serving(world, here, admission=admission, store={"backoff_seconds": 0.0}) as parts:
        with monkeypatch.context() as patch:

            def fail(*_, **__):
                raise error

            patch.setattr(AutoTokenizer, "from_pretrained", fail)
            asked = complete(parts)
            assert error_of(asked, 503)["code"] == "model_not_loaded" and int(asked.headers["Retry-After"]) >= 1
            error_of(parts.client.put("/admin/deltas/signs"), 503)
            assert not parts.client.get("/admin/deltas/signs").json()["unusable"]
        assert complete(parts).status_code == 200
        assert [e["verdict"] for e in parts.client.get("/admin/decisions").json()["data"]] == ["admitted"] * admission


def test_a_disk_without_room_for_copies_is_no_fault_of_the_delta(world, here, monkeypatch):
    write_tokenizer(here / "deltas" / "signs")
    with serving(world, here, admission=False, store={"backoff_seconds": 0.0}) as parts:
        with monkeypatch.context() as patch:

            def full(*_, **__):
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(tempfile, "mkdtemp", full)
            error_of(complete(parts), 503)
        assert complete(parts).status_code == 200


def test_a_version_that_passed_is_not_read_again(world, here, monkeypatch):
    from deltakeeper.service import tenant_text

    write_tokenizer(here / "deltas" / "signs")
    read, real = [], tenant_text.read_text
    monkeypatch.setattr(tenant_text, "read_text", lambda *given, **named: read.append(1) or real(*given, **named))
    with serving(world, here, admission=False) as parts:
        for _ in range(2):
            parts.store.load("signs").result(30)
            parts.store.unload("signs")
            wait_until(lambda: parts.store.state("signs") == "cold")
        parts.store.load("signs").result(30)
    assert len(read) == 1


def test_a_disk_that_fails_while_policy_looks_decides_nothing(world, here, monkeypatch):
    with serving(world, here) as parts:

        def broken(folder):
            raise UnreadableError(f"{folder} cannot be read (Input/output error); check the disk.")

        monkeypatch.setattr(deciding, "open_artifact", broken)
        refused = parts.client.put("/admin/deltas/signs")
        assert error_of(refused, 503) and refused.headers["Retry-After"]
        assert parts.admission.history() == []


def test_what_is_too_large_for_the_memory_is_no_matter_of_policy(world, here):
    with serving(world, here, store={"byte_budget": 1000}) as parts:
        for _ in range(2):
            assert error_of(complete(parts), 422)["code"] == "model_unusable"
        error_of(parts.client.put("/admin/deltas/signs"), 413)
        with pytest.raises(OversizedError):
            parts.admission.settle("signs", 30)
        assert parts.admission.history() == []


# -- the canary --


@pytest.mark.parametrize(
    ("template", "says"),
    [(FAILING, "no such role"), ("{{ 'w1 ' * 9999 }}", "tokens"), ("{% for %}", "chat template")],
    ids=["fails", "long", "malformed"],
)
def test_a_template_that_fails_on_the_canarys_prompts_refuses_its_delta_once(world, here, template, says):
    word(here, template)
    with serving(world, here, canary=LENIENT) as parts:
        for _ in range(2):
            asked = complete(parts)
            assert error_of(asked, 422)["code"] == "not_admitted" and "Retry-After" not in asked.headers
        [entry] = parts.client.get("/admin/decisions").json()["data"]
        assert (entry["name"], entry["verdict"]) == ("signs", "refused")
        assert says in entry["reasons"][0] and "its own" in entry["reasons"][0]
        assert "base" not in entry["reasons"][0]
        assert parts.client.get("/admin/deltas/signs").json()["decision"]["reasons"] == entry["reasons"]
        assert "signs" not in listed(parts) and complete(parts, "ranks").status_code == 200


def test_a_template_that_was_ended_is_tried_again_and_the_log_says_whose_it_is(world, here, caplog):
    word(here, LOOPS)
    with serving(world, here, canary=LENIENT) as parts:
        asked = complete(parts)
        assert error_of(asked, 503)["code"] == "model_not_loaded" and asked.headers["Retry-After"]
        assert parts.client.get("/admin/decisions").json()["data"] == []
    [told] = [r.getMessage() for r in caplog.records if "waits for its canary" in r.getMessage()]
    assert "the delta's own chat template gave nothing (it takes too long)" in told and "base" not in told


def test_a_base_that_does_not_take_the_prompts_is_not_the_deltas_fault(world, here, caplog):
    with serving(world, here, canary=LENIENT | {"system": "w3"}) as parts:  # for which there is no template
        error_of(complete(parts), 503)
        assert parts.client.get("/admin/decisions").json()["data"] == []
    assert "into the base's chat template" in caplog.text


def test_a_tokenizer_that_panics_is_the_deltas_fault(world, here):
    """What a library in Rust raises is no Exception, and would end the thread that runs trials."""

    class PanicException(BaseException):
        pass

    with serving(world, here, canary=LENIENT) as parts:
        canary = parts.admission._trials.canary

        class Broken:
            chat_template = None

            def __call__(self, *_, **__):
                raise PanicException("index out of bounds")

        with pytest.raises(Exception, match=r"its own words: the tokenizer cannot be read \(index out of bounds"):
            canary.measure(None, Broken())
        assert canary.measure(None).prompts == len(PROMPTS)


def test_a_chat_whose_template_was_ended_is_to_be_asked_again(world, here, monkeypatch):
    monkeypatch.setattr(templates, "_PAUSE_SECONDS", 41.0)
    word(here, "{{ 'a' * 10**9 }}")
    with serving(world, here) as parts:
        body = {"model": "signs", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 2}
        asked = parts.client.post("/v1/chat/completions", json=body)
        assert error_of(asked, 503)["code"] == "template_ended" and asked.headers["Retry-After"] == "41"
        assert "it takes too much memory" in asked.text
        assert "it took too much memory a moment ago" in parts.client.post("/v1/chat/completions", json=body).text
        word(here, FAILING, "ranks")
        refused = parts.client.post("/v1/chat/completions", json=body | {"model": "ranks"})
        assert error_of(refused, 400)["param"] == "messages"
