"""The routes of deltas and decisions over a running engine: what is put, turned over, taken away, and kept out."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
from admission_parts import error_of, serving

from deltakeeper.artifact import open_artifact
from deltakeeper.engine import Request
from deltakeeper.engine.tenant_files import payload_bytes
from deltakeeper.service.access import Principal
from deltakeeper.service.admission import decisions, deltas
from deltakeeper.service.errors import NotFound, Unavailable
from deltakeeper.service.guard import guarded_routes
from deltakeeper.service.tenants import check_still_there

ADMIN = {"Authorization": "Bearer admin"}
KEYS = {"admin": Principal("a", "admin"), "tenant": Principal("t", "tenant", frozenset({"signs"}))}


def ask(parts, tenant="signs", tokens=4):
    return parts.engine.submit(Request((5, 6, 7), tenant, tokens)).result(30)


def test_all_of_these_routes_are_for_administrators(world, here):
    routes = list(guarded_routes([*deltas.router.routes, *decisions.router.routes]))
    assert len(routes) == 7 and {kind for _, kind in routes} == {"manage"}
    with serving(world, here, KEYS) as parts:
        calls = [
            ("GET", "/admin/deltas"),
            ("GET", "/admin/deltas/signs"),
            ("PUT", "/admin/deltas/signs"),
            ("DELETE", "/admin/deltas/signs"),
            ("GET", "/admin/decisions"),
            ("POST", "/v1/load_lora_adapter"),
            ("POST", "/v1/unload_lora_adapter"),
        ]
        for method, path in calls:
            error_of(parts.client.request(method, path), 401)
            error_of(parts.client.request(method, path, headers={"Authorization": "Bearer tenant"}), 403)
        assert parts.client.get("/admin/deltas", headers=ADMIN).status_code == 200
        assert (here / "deltas" / "signs").is_dir()


def test_a_delta_is_put_shown_listed_and_deleted(world, here):
    with serving(world, here) as parts:
        client = parts.client
        put = client.put("/admin/deltas/signs")
        assert put.status_code == 200  # the start knew it
        card = put.json()
        assert card["state"] == "resident" and card["artifact"]["codec"] == "bitdelta:bits=2"
        assert card["artifact"]["stored_planes"] == 2 and card["decision"]["verdict"] == "admitted"
        assert card["decision"]["manifest_sha256"] == card["artifact"]["manifest_sha256"]
        assert str(here) not in put.text
        assert client.get("/admin/deltas/signs").json() == card | {"read_ahead": card["read_ahead"]}
        listed = client.get("/admin/deltas").json()
        assert [one["id"] for one in listed["data"]] == ["ranks", "second", "signs", "stranger"]
        assert listed["resident_bytes"] == card["resident_bytes"] > 0
        new = client.put("/admin/deltas/copy", json={"path": "signs", "planes": 1})
        assert new.status_code == 201 and new.json()["artifact"]["asked_planes"] == 1
        assert (here / "deltas" / "copy").readlink().name == "signs"
        assert "stands for the same artifact" in error_of(client.delete("/admin/deltas/signs"), 409)["message"]
        assert client.delete("/admin/deltas/copy").json() == {"id": "copy", "object": "delta", "deleted": True}
        assert client.delete("/admin/deltas/signs").status_code == 200
        error_of(client.delete("/admin/deltas/signs"), 404)
        error_of(client.get("/admin/deltas/signs"), 404)
        assert ask(parts).finish_reason == "error" and parts.store.stats().pins == 0
        assert "signs" not in parts.store.scan() and not (here / "deltas" / "signs").exists()
        assert (here / "deltas" / ".removed" / "signs-1" / "delta_config.json").is_file()


def remove_before_it_is_read(link, monkeypatch):
    """The link itself, which goes when somebody has seen that it is one and reads where it leads."""
    read = os.readlink

    def read_late(path, *more, **options):
        if Path(path) == link:
            link.unlink(missing_ok=True)
        return read(path, *more, **options)

    monkeypatch.setattr(os, "readlink", read_late)
    return link


def test_a_delta_whose_link_goes_while_it_is_shown_is_shown_without_its_artifact(world, here, monkeypatch):
    with serving(world, here, admission=False) as parts:
        assert parts.client.put("/admin/deltas/copy", json={"path": "signs", "load": False}).status_code == 201
        link = remove_before_it_is_read(here / "deltas" / "copy", monkeypatch)
        shown = parts.client.get("/admin/deltas/copy")
        assert (shown.status_code, shown.json().get("artifact", 0)) == (200, None)
        assert not link.is_symlink()


def test_a_model_whose_link_goes_while_it_is_looked_for_is_not_there(world, here, monkeypatch):
    with serving(world, here, admission=False) as parts:
        link = remove_before_it_is_read(here / "deltas" / "copy", monkeypatch)
        link.symlink_to("signs")
        asked = parts.client.post("/v1/completions", json={"model": "copy", "prompt": "w5", "max_tokens": 1})
        assert error_of(asked, 404)["code"] == "model_not_found" and not link.is_symlink()


def test_what_was_put_is_there_after_a_restart(world, here):
    with serving(world, here) as parts:
        assert parts.client.put("/admin/deltas/live", json={"path": "second", "load": False}).status_code == 201
        assert parts.client.delete("/admin/deltas/ranks").status_code == 200
        assert parts.client.get("/admin/deltas/live").json()["state"] == "cold"
        first = ask(parts, "live").tokens
    with serving(world, here) as parts:
        assert parts.store.names() == ["live", "second", "signs", "stranger"]
        assert ask(parts, "live").tokens == ask(parts, "second").tokens == first != ask(parts, "signs").tokens


class FakeRegister(dict):
    def record(self, name, folder, **noted):
        self[name] = (folder, noted)

    def forget(self, name):
        if self.pop(name, None) is None:
            raise NotFound("There is none.")


def test_a_service_that_keeps_state_is_told(world, here):
    with serving(world, here) as parts:
        gate = parts.client.app.state.services.gate
        gate.tenants = FakeRegister()
        parts.client.put("/admin/deltas/live", json={"path": "signs", "planes": 1, "load": False})
        sha = parts.client.get("/admin/deltas/live").json()["artifact"]["manifest_sha256"]
        assert gate.tenants == {"live": ("live", {"planes": 1, "manifest_sha256": sha})}
        error_of(parts.client.put("/admin/deltas/other", json={"path": "stranger"}), 422)
        assert parts.client.delete("/admin/deltas/ranks").status_code == 200  # nobody had told it of that one
        assert list(gate.tenants) == ["live"]
        assert parts.client.delete("/admin/deltas/live").status_code == 200 and not gate.tenants


def test_a_removal_that_cannot_be_noted_is_no_removal(world, here):
    class Unwritable(FakeRegister):
        def forget(self, name):
            raise Unavailable("The state cannot be written.", retry_after=1.0)

    with serving(world, here) as parts:
        gate = parts.client.app.state.services.gate
        gate.tenants = FakeRegister()
        parts.client.put("/admin/deltas/live", json={"path": "signs"})
        gate.tenants = Unwritable(gate.tenants)
        seen = sorted(here.rglob("*"))
        for name in ("live", "ranks"):
            error_of(parts.client.delete(f"/admin/deltas/{name}"), 503)
            assert len(ask(parts, name).tokens) == 4
        assert [path for path in sorted(here.rglob("*")) if path.name != ".removed"] == seen
        assert (here / "deltas" / "live").readlink().name == "signs"


def test_a_statement_goes_with_its_artifact(world, here):
    deltas = here / "deltas"
    for name in ("signs", "second"):
        (deltas / f"{name}.attestation.json").write_text(name)
    (deltas / ".removed").mkdir()
    (deltas / ".removed" / "second-1.attestation.json").write_text("an earlier one")
    with serving(world, here) as parts:
        for name in ("signs", "second"):
            assert parts.client.delete(f"/admin/deltas/{name}").status_code == 200
        assert not list(deltas.glob("*.attestation.json"))
        for name in ("signs-1", "second-2"):
            assert (deltas / ".removed" / name / "delta_config.json").is_file()
            assert (deltas / ".removed" / f"{name}.attestation.json").read_text() == name.partition("-")[0]


def test_a_name_is_turned_over_while_it_answers(world, here):
    with serving(world, here) as parts:
        client = parts.client
        assert client.put("/admin/deltas/live", json={"path": "signs"}).status_code == 201
        before, other = ask(parts, "live").tokens, ask(parts, "second").tokens
        assert before != other
        error_of(client.put("/admin/deltas/live", json={"path": "second"}), 409)
        assert ask(parts, "live").tokens == before
        running_one = parts.engine.submit(Request((5, 6, 7), "live", 40))
        long = ask(parts, "signs", 40).tokens
        assert client.put("/admin/deltas/live", json={"path": "second", "replace": True}).status_code == 200
        assert running_one.result(30).tokens == long
        assert ask(parts, "live").tokens == other and (here / "deltas" / "live").readlink().name == "second"
        assert client.put("/admin/deltas/ranks", json={"path": "second", "replace": True}).status_code == 200
        assert (here / "deltas" / ".removed" / "ranks-1").is_dir() and ask(parts, "ranks").tokens == other


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "/etc",
        "..",
        ".",
        "signs/../../outside",
        "leak",
        ".hidden",
        "signs/sub",
        "absent",
        "a" * 4000,
        "a\0b",
    ],
)
def test_paths_stay_among_the_deltas_and_say_nothing_of_the_rest(world, here, path):
    shutil.copytree(here / "deltas" / "signs", here / "outside")
    shutil.copytree(here / "deltas" / "signs", here / "deltas" / ".hidden")
    shutil.copytree(here / "deltas" / "signs", here / "deltas" / "signs" / "sub")
    with serving(world, here) as parts:
        (here / "deltas" / "leak").symlink_to(here / "outside")
        for call in (
            parts.client.put("/admin/deltas/new", json={"path": path}),
            parts.client.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": path}),
        ):
            message = error_of(call, 404)["message"]
            assert "There is no artifact" in message and str(here) not in message
        assert "new" not in parts.store.names()


def test_what_is_kept_out_changes_nothing(world, here):
    with serving(world, here, codecs=["bitdelta"], store={"byte_budget": 50_000}) as parts:
        client = parts.client
        seen = sorted(path.name for path in (here / "deltas").iterdir())
        foreign = error_of(client.put("/admin/deltas/new", json={"path": "stranger"}), 422)
        assert "is for the base" in foreign["message"] and parts.admission.known("new").verdict == "refused"
        error = error_of(client.put("/admin/deltas/new", json={"path": "ranks"}), 422)
        assert error["code"] == "not_admitted" and "'svd'" in error["message"]
        error_of(client.put("/admin/deltas/base", json={"path": "signs"}), 409)
        error_of(client.put("/admin/deltas/.new", json={"path": "signs"}), 400)
        error_of(client.put("/admin/deltas/new", json={"pth": "signs"}), 400)
        error_of(client.put("/admin/deltas/new", json={"path": "signs", "planes": 3}), 422)
        payload = here / "deltas" / "second" / "delta_model.safetensors"
        raw = bytearray(payload.read_bytes())
        raw[-1] ^= 1
        payload.write_bytes(raw)
        error_of(client.put("/admin/deltas/new", json={"path": "second"}), 422)
        assert parts.store.names() == ["ranks", "second", "signs", "stranger"]
        assert sorted(path.name for path in (here / "deltas").iterdir()) == seen
        error_of(client.get("/admin/deltas/new"), 404)
    with serving(world, here, store={"byte_budget": 1000}) as parts:
        error_of(parts.client.put("/admin/deltas/new", json={"path": "signs"}), 413)


@pytest.mark.parametrize("admission", [True, False])
def test_a_delta_that_takes_more_in_memory_than_there_is_room_for_is_too_large(world, here, admission):
    with serving(world, here, admission=admission) as parts:
        held = parts.client.put("/admin/deltas/signs").json()["resident_bytes"]
    assert held > payload_bytes(open_artifact(here / "deltas" / "signs"), None)  # so that its headers let it in
    with serving(world, here, admission=admission, store={"byte_budget": held - 1}) as parts:
        refused = parts.client.put("/admin/deltas/new", json={"path": "signs"})
        assert f"{held:,} bytes" in error_of(refused, 413)["message"] and "Retry-After" not in refused.headers
        assert "new" not in parts.store.names() and not (here / "deltas" / "new").exists()


def test_a_version_whose_canary_fails_gives_way_to_the_one_before(world, here, monkeypatch):
    with serving(world, here, canary={"refusals_at_least": 0.0, "broken_at_most": 1.0}) as parts:
        client, canary = parts.client, parts.admission._trials.canary
        assert client.put("/admin/deltas/live", json={"path": "signs"}).status_code == 201
        before = ask(parts, "live").tokens
        monkeypatch.setattr(canary, "faults", lambda reading: ["It is worse than before."])
        seen = []
        asking = threading.Thread(target=lambda: seen.append(ask(parts, "live").tokens))
        error = error_of(client.put("/admin/deltas/live", json={"path": "second", "replace": True}), 422)
        asking.start()
        assert "worse than before" in error["message"]
        asking.join(30)
        assert seen == [before] and (here / "deltas" / "live").readlink().name == "signs"
        assert client.get("/admin/deltas/live").json()["decision"]["verdict"] == "admitted"
        assert parts.admission.known("live").verdict == "admitted"
        log = client.get("/admin/decisions", params={"name": "live"}).json()["data"]
        assert [entry["verdict"] for entry in log] == ["refused", "admitted"]


def test_two_changes_of_one_name_do_not_meet(world, here, monkeypatch):
    with serving(world, here) as parts:
        begun, go_on, found = threading.Event(), threading.Event(), []
        real = parts.overlay.load

        def held_up(artifact, *, planes=None):
            begun.set()
            assert go_on.wait(30)
            return real(artifact, planes=planes)

        monkeypatch.setattr(parts.overlay, "load", held_up)
        first = threading.Thread(target=lambda: found.append(parts.client.put("/admin/deltas/signs").status_code))
        first.start()
        assert begun.wait(30)
        assert "is being changed" in error_of(parts.client.put("/admin/deltas/signs"), 409)["message"]
        error_of(parts.client.put("/admin/deltas/new", json={"path": "signs"}), 409)
        error_of(parts.client.delete("/admin/deltas/signs"), 409)
        assert parts.client.get("/admin/deltas/signs").json()["state"] == "loading"
        go_on.set()
        first.join(30)
        assert found == [200] and parts.client.put("/admin/deltas/signs").status_code == 200


@pytest.mark.parametrize("admission", [True, False])
def test_a_name_that_is_deleted_while_it_is_loaded_is_not_refused_for_its_files(world, here, monkeypatch, admission):
    with serving(world, here, admission=admission) as parts:
        assert parts.client.put("/admin/deltas/live", json={"path": "signs", "load": False}).status_code == 201
        real = parts.overlay.load

        def taken_away(artifact, *, planes=None):
            (here / "deltas" / "live").unlink(missing_ok=True)
            return real(artifact, planes=planes)

        monkeypatch.setattr(parts.overlay, "load", taken_away)
        for _ in range(2):
            error_of(parts.client.post("/v1/completions", json={"model": "live", "prompt": "w1"}), 404)
        with pytest.raises(NotFound):  # the end of a request that had been taken before
            check_still_there(parts.client.app.state.services, "live")
        assert parts.client.get("/admin/decisions").json()["data"] == []


def test_decisions_are_listed_latest_first_in_pages(world, here):
    with serving(world, here, codecs=["bitdelta"]) as parts:
        ask(parts, "ranks")
        ask(parts, "signs")
        both = parts.client.get("/admin/decisions").json()["data"]
        assert [(e["name"], e["verdict"]) for e in both] == [("signs", "admitted"), ("ranks", "refused")]
        assert both[0]["policy"] == parts.admission.file.sha256 and both[1]["reasons"]
        page = parts.client.get("/admin/decisions", params={"before": both[0]["number"], "limit": 1}).json()["data"]
        assert page == [both[1]]
        error_of(parts.client.get("/admin/decisions", params={"limit": 0}), 400)


def test_without_a_policy_whatever_fits_the_base_is_served(world, here):
    with serving(world, here, admission=False) as parts:
        card = parts.client.put("/admin/deltas/ranks").json()
        assert card["decision"] is None and card["state"] == "resident"
        foreign = error_of(parts.client.put("/admin/deltas/new", json={"path": "stranger"}), 422)
        assert "not the base" in foreign["message"]
        assert parts.client.get("/admin/decisions").json() == {"object": "list", "data": []}


def test_a_delta_of_another_base_is_refused_by_policy_and_the_refusal_is_logged(world, here):
    with serving(world, here) as parts:
        for _ in range(2):  # the second while the store waits before it tries again
            asked = parts.client.post("/v1/completions", json={"model": "stranger", "prompt": "w1"})
            assert error_of(asked, 422)["code"] == "not_admitted" and "Retry-After" not in asked.headers
        [entry] = parts.client.get("/admin/decisions").json()["data"]
        assert (entry["name"], entry["verdict"]) == ("stranger", "refused") and "is for the base" in entry["reasons"][0]
        assert "stranger" not in {card["id"] for card in parts.client.get("/v1/models").json()["data"]}


def test_an_artifact_that_cannot_be_read_is_refused_by_policy_with_the_reason(world, here):
    (here / "deltas" / "signs" / "delta_config.json").write_text("{")
    with serving(world, here) as parts:
        asked = parts.client.post("/v1/completions", json={"model": "signs", "prompt": "w1"})
        assert error_of(asked, 422)["code"] == "not_admitted"
        [entry] = parts.client.get("/admin/decisions").json()["data"]
        assert "not JSON" in entry["reasons"][0]


def test_without_a_policy_the_operator_is_told_once_why_a_delta_cannot_be_served(world, here, caplog):
    with serving(world, here, admission=False) as parts:
        for _ in range(3):
            asked = parts.client.post("/v1/completions", json={"model": "stranger", "prompt": "w1"})
            assert error_of(asked, 422)["code"] == "model_unusable" and "Retry-After" not in asked.headers
        assert "stranger" not in {card["id"] for card in parts.client.get("/v1/models").json()["data"]}
    told = [record.getMessage() for record in caplog.records if "cannot be served" in record.getMessage()]
    assert len(told) == 1 and "is not the base that is served" in told[0] and "serve it on its own base" in told[0]


def test_clients_of_vllm_load_and_unload(world, here):
    with serving(world, here) as parts:
        client = parts.client
        load = {"lora_name": "signs", "lora_path": str(here / "deltas" / "signs"), "lora_int_id": 3}
        done = client.post("/v1/load_lora_adapter", json=load)
        assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'signs' added successfully.")
        assert done.headers["content-type"].startswith("text/plain")
        assert "has already been loaded" in error_of(client.post("/v1/load_lora_adapter", json=load), 400)["message"]
        assert client.post("/v1/load_lora_adapter", json=load | {"load_inplace": True}).status_code == 200
        other = {"lora_name": "mine", "lora_path": "second"}
        assert client.post("/v1/load_lora_adapter", json=other).status_code == 200
        gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
        assert gone.text == "Success: LoRA adapter 'mine' removed successfully."
        assert not (here / "deltas" / "mine").is_symlink()
        assert (
            "cannot be found"
            in error_of(client.post("/v1/unload_lora_adapter", json={"lora_name": "nobody"}), 404)["message"]
        )
        error_of(client.post("/v1/load_lora_adapter", json={"lora_name": "x"}), 400)
        error_of(client.post("/v1/unload_lora_adapter", json={}), 400)
