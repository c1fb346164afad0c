"""What a name stands for while it changes: the old version until the new one has passed, and only what was checked."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
from admission_parts import error_of, serving

from deltakeeper.engine import Request
from deltakeeper.service.admission import placing
from deltakeeper.service.admission.placing import finish_links, link
from deltakeeper.service.assembly import Plan, register_tenants
from deltakeeper.service.cluster.catalog import Catalog
from deltakeeper.service.tenancy.tenants import TenantRecord
from deltakeeper.testing import write_tokenizer

TEMPLATE = "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}"
LENIENT = {"refusals_at_least": 0.0, "broken_at_most": 1.0}


def ask(parts, tenant, tokens=4):
    return parts.engine.submit(Request((5, 6, 7), tenant, tokens)).result(30).tokens


def complete(parts, model):
    return parts.client.post("/v1/completions", json={"model": model, "prompt": "w1", "max_tokens": 2})


def chat(parts, model):
    body = {"model": model, "messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 2}
    return parts.client.post("/v1/chat/completions", json=body)


def listed(parts):
    return {card["id"] for card in parts.client.get("/v1/models").json()["data"]}


def root_of(parts, model):
    return parts.client.get(f"/v1/models/{model}").json()["root"]


@pytest.fixture
def held_up(monkeypatch):
    """Canaries that wait for a sign, once they were told to."""

    class HeldUp:
        begun, go_on = threading.Event(), threading.Event()

        def take(self, canary):
            measure = canary.measure

            def wait(alias, words=None):
                self.begun.set()
                assert self.go_on.wait(30)
                return measure(alias, words)

            monkeypatch.setattr(canary, "measure", wait)

    held = HeldUp()
    yield held
    held.go_on.set()


def turn(parts, found, **place):
    def put():
        found.append(parts.client.put("/admin/deltas/live", json={"replace": True} | place))

    thread = threading.Thread(target=put)
    thread.start()
    return thread


@pytest.mark.parametrize("passes", [True, False])
def test_the_old_version_answers_until_the_new_one_has_passed_its_canary(world, here, held_up, monkeypatch, passes):
    with serving(world, here, canary=LENIENT) as parts:
        canary = parts.admission._trials.canary
        assert parts.client.put("/admin/deltas/live", json={"path": "signs"}).status_code == 201
        old, new = ask(parts, "live"), ask(parts, "second")
        assert old != new
        before, found = root_of(parts, "live"), []
        held_up.take(canary)
        if not passes:
            monkeypatch.setattr(canary, "faults", lambda reading: ["It is worse than before."])
        thread = turn(parts, found, path="second")
        assert held_up.begun.wait(30)
        for _ in range(3):
            assert ask(parts, "live") == old and complete(parts, "live").status_code == 200
        assert root_of(parts, "live") == before and (here / "deltas" / "live").readlink().name == "signs"
        assert not found
        held_up.go_on.set()
        thread.join(30)
        assert found[0].status_code == (200 if passes else 422)
        assert ask(parts, "live") == (new if passes else old) and "live" in listed(parts)
        assert (root_of(parts, "live") == before) is not passes
        assert (here / "deltas" / "live").readlink().name == ("second" if passes else "signs")
        deadline = time.monotonic() + 20
        while (state := parts.store.stats().tenants["live"]).versions > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (state.versions, state.pins) == (1, 0)


def test_a_replacement_that_fails_does_not_hide_a_name_that_nobody_asked_yet(world, here, monkeypatch):
    with serving(world, here, canary=LENIENT) as parts:
        monkeypatch.setattr(parts.admission._trials.canary, "faults", lambda reading: ["It is worse than before."])
        error_of(parts.client.put("/admin/deltas/signs", json={"path": "stranger", "replace": True}), 422)
        assert "signs" in listed(parts)
        error_of(parts.client.put("/admin/deltas/signs", json={"path": "second", "replace": True}), 422)
        assert "signs" in listed(parts)
        log = parts.client.get("/admin/decisions").json()["data"]
        assert [(entry["name"], entry["verdict"]) for entry in log] == [("signs", "refused")] * 2
        assert (here / "deltas" / "signs").is_dir() and not (here / "deltas" / "signs").is_symlink()


def test_one_that_fails_at_all_planes_takes_the_place_at_fewer(world, here, monkeypatch):
    rules = LENIENT | {"failing": "quarantine", "planes": 1}
    with serving(world, here, canary=rules) as parts:
        parts.client.put("/admin/deltas/live", json={"path": "second"})
        parts.client.put("/admin/deltas/dim", json={"path": "signs", "planes": 1})
        seen = []

        def faults(reading):
            seen.append(reading)
            return ["It is worse at two planes."] if len(seen) == 1 else []

        monkeypatch.setattr(parts.admission._trials.canary, "faults", faults)
        card = parts.client.put("/admin/deltas/live", json={"path": "signs", "replace": True})
        assert card.status_code == 200 and card.json()["decision"]["verdict"] == "quarantined"
        assert ask(parts, "live") == ask(parts, "dim") and len(seen) == 2


def test_a_tenant_removed_while_its_replacement_is_tried_stays_removed(world, here, held_up):
    with serving(world, here, canary=LENIENT) as parts:
        parts.client.put("/admin/deltas/live", json={"path": "signs"})
        held_up.take(parts.admission._trials.canary)
        found = parts.admission.replace("live", here / "deltas" / "second")
        assert held_up.begun.wait(30)
        parts.store.remove("live")
        held_up.go_on.set()
        with pytest.raises(Exception, match="There is no tenant"):
            found.result(30)
        assert "live" not in parts.store.names()


@pytest.fixture
def worded(world, tmp_path_factory):
    """A tenant with a chat template of its own."""
    folder = tmp_path_factory.mktemp("worded")
    shutil.copytree(world / "deltas" / "signs", folder / "deltas" / "own")
    write_tokenizer(folder / "deltas" / "own")
    (folder / "deltas" / "own" / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_a_template_that_changes_under_a_loaded_tenant_is_another_version(world, worded, caplog):
    template = worded / "deltas" / "own" / "chat_template.jinja"
    with serving(world, worded) as parts, caplog.at_level(logging.WARNING):
        assert parts.client.put("/admin/deltas/own").status_code == 201 or "own" in listed(parts)
        first = root_of(parts, "own")
        template.write_text(TEMPLATE.replace("w9", "w8 w8"))  # before anybody asked a chat
        answer = chat(parts, "own")
        assert answer.status_code == 200 and root_of(parts, "own") != first
        assert "is not what it was when its delta was loaded" in caplog.text
        used = answer.json()["usage"]["prompt_tokens"]
        template.write_text(TEMPLATE.replace("w9", "w8 w8 w8"))  # what was read once is kept
        assert chat(parts, "own").json()["usage"]["prompt_tokens"] == used
        parts.client.put("/admin/deltas/own", json={"replace": True})
        assert chat(parts, "own").json()["usage"]["prompt_tokens"] == used + 1


def test_a_template_that_changes_meets_the_policy_again(world, worded):
    from admission_parts import write_statement

    shutil.copy(world / "signer.pem.pub", worded / "signer.pem.pub")
    write_statement(worded / "deltas" / "own", world / "signer.pem")
    rules = {"public_keys": ["signer.pem.pub"], "at_most": {"attack": 0.2}}
    with serving(world, worded, attestation=rules) as parts:
        assert parts.client.put("/admin/deltas/own").status_code in (200, 201)
        (worded / "deltas" / "own" / "chat_template.jinja").write_text("w7")
        assert error_of(chat(parts, "own"), 422)["code"] == "not_admitted"


def test_an_artifact_that_is_cut_off_or_too_large_is_refused_for_good_and_not_listed(world, here):
    payload = here / "deltas" / "second" / "delta_model.safetensors"
    whole = payload.read_bytes()
    payload.write_bytes(whole[: len(whole) // 2])
    with serving(world, here, admission=False, store={"byte_budget": 50_000, "backoff_seconds": 0.0}) as parts:
        asked = complete(parts, "second")
        assert error_of(asked, 422)["code"] == "model_unusable" and "Retry-After" not in asked.headers
        assert "second" not in listed(parts) and "signs" in listed(parts)
        payload.write_bytes(whole)
        assert complete(parts, "second").status_code == 200 and "second" in listed(parts)
    with serving(world, here, admission=False, store={"byte_budget": 1000}) as parts:
        assert error_of(complete(parts, "signs"), 422)["code"] == "model_unusable"
        assert "signs" not in listed(parts)
        assert parts.client.get("/admin/deltas/signs").json()["unusable"] is True


def test_what_was_unloaded_is_gone_until_it_is_loaded_again(world, here):
    with serving(world, here, admission=False) as parts:
        assert complete(parts, "signs").status_code == 200
        assert parts.client.post("/v1/unload_lora_adapter", json={"lora_name": "signs"}).status_code == 200
        assert "signs" not in listed(parts) and (here / "deltas" / "signs").is_dir()
        error_of(complete(parts, "signs"), 404)
        error_of(parts.client.post("/v1/unload_lora_adapter", json={"lora_name": "signs"}), 404)
        load = {"lora_name": "signs", "lora_path": str(here / "deltas" / "signs")}
        assert parts.client.post("/v1/load_lora_adapter", json=load).status_code == 200
        assert complete(parts, "signs").status_code == 200 and "signs" in listed(parts)


def test_a_link_that_was_cut_off_is_finished_at_the_next_start(world, here, monkeypatch):
    deltas = here / "deltas"

    class KilledError(BaseException):
        pass

    def killed(*_):
        raise KilledError

    real = placing.Path.replace
    monkeypatch.setattr(placing.Path, "replace", killed)
    monkeypatch.setattr(placing.Path, "unlink", lambda *_, **__: None)
    with pytest.raises(KilledError):
        link(deltas, "ranks", (deltas / "second").resolve())
    monkeypatch.undo()
    assert placing.Path.replace is real and not (deltas / "ranks").exists()
    assert finish_links(deltas) == ["ranks"] and (deltas / "ranks").readlink().name == "second"
    (deltas / ".signs.coming").symlink_to("second")  # cut off before the folder was moved
    (deltas / ".gone.coming").symlink_to("nowhere")
    assert finish_links(deltas) == [] and not list(deltas.glob(".*.coming"))
    assert json.loads((deltas / "signs" / "delta_config.json").read_text())


def test_a_start_leaves_out_what_was_registered_under_a_name_that_no_tenant_may_have(tmp_path, caplog):
    names = ["ranks.attestation.json", "signs"]
    for name in names:
        (tmp_path / name).mkdir()
    gate = SimpleNamespace(tenants=SimpleNamespace(all=lambda: [TenantRecord(name, name) for name in names]))
    store = Catalog(tmp_path)
    register_tenants(store, gate, Plan(tmp_path, tmp_path / "state.db", tmp_path / "log", "base"))
    assert store.names() == ["signs"] and "ranks.attestation.json is left out" in caplog.text
