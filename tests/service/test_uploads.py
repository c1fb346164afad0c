"""Artifacts pushed to a live service: what is whole and let in stands among the deltas, the rest leaves nothing."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import tarfile
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from admission_parts import running, write_policy
from service_cases import FakeGate, served, wait_until
from typer.testing import CliRunner

from deltakeeper.artifact import DeltaArtifact
from deltakeeper.cli import app as cli
from deltakeeper.errors import UnreadableError
from deltakeeper.service.access import Principal
from deltakeeper.service.admission import deltas as delta_routes
from deltakeeper.service.running import Services
from deltakeeper.service.settings import ServiceSettings
from deltakeeper.service.uploads import arrival
from deltakeeper.service.uploads import routes as upload_routes

KEYS = {"admin": Principal("a", "admin"), "tenant": Principal("t", "tenant", frozenset({"signs"}))}


@contextmanager
def service(world, tmp_path, settings=None, **policy):
    (tmp_path / "deltas").mkdir(parents=True)
    with running(world, tmp_path / "deltas", write_policy(tmp_path, **policy), tmp_path / "log.jsonl") as parts:
        services = Services(
            engine=parts.engine,
            store=parts.store,
            base=parts.base,
            base_name="base",
            gate=FakeGate(KEYS),
            deltas=tmp_path / "deltas",
            admission=parts.admission,
            settings=settings or ServiceSettings(),
        )
        with served(services, [delta_routes.router, upload_routes.router]) as live, live.client("admin") as client:
            yield SimpleNamespace(live=live, client=client, deltas=tmp_path / "deltas", log=parts.log)


def packed(folder, *, leave_out=(), more=(), form=tarfile.USTAR_FORMAT):
    """An archive of a folder's files, with further members as pairs of header and content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for path in sorted(folder.iterdir()):
            if path.name not in leave_out:
                archive.add(path, path.name)
        for head, content in more:
            head.size = len(content)
            archive.addfile(head, io.BytesIO(content))
    return out.getvalue()


def member(name, kind=tarfile.REGTYPE, target=""):
    head = tarfile.TarInfo(name)
    head.type, head.linkname = kind, target
    return head


def left(deltas):
    """Everything in the folder of the deltas but the place where artifacts arrive, which has to be empty."""
    incoming = deltas / ".incoming"
    assert not incoming.exists() or not list(incoming.iterdir())
    return sorted(path.name for path in deltas.iterdir() if path != incoming)


def put(at, name, body, **more):
    return at.client.put(f"/admin/artifacts/{name}", content=body, **more)


def test_an_artifact_is_pushed_asked_and_not_overwritten(world, tmp_path):
    with service(world, tmp_path, settings=ServiceSettings(max_body_bytes=4096)) as at:
        made = put(at, "support", packed(world / "deltas" / "signs"))
        assert made.status_code == 201, made.text
        card = made.json()
        assert (card["id"], card["object"], card["codec"]) == ("support", "artifact", "bitdelta:bits=2")
        assert {path.name for path in (at.deltas / "support").iterdir()} == {
            path.name for path in (world / "deltas" / "signs").iterdir()
        }
        asked = at.client.post("/v1/completions", json={"model": "support", "prompt": "w5", "max_tokens": 2})
        assert asked.status_code == 200
        again = put(at, "support", packed(world / "deltas" / "ranks"))
        assert again.status_code == 409 and "is taken" in again.json()["error"]["message"]
        assert put(at, "support-2", packed(world / "deltas" / "ranks")).status_code == 201
        turned = at.client.put("/admin/deltas/support", json={"path": "support-2", "replace": True})
        assert turned.status_code == 200 and turned.json()["artifact"]["codec"] == "svd:rank=8"
        assert left(at.deltas) == [".removed", "support", "support-2"]


def test_what_tar_itself_writes_is_taken(world, tmp_path):
    command = ["tar", "--format=ustar", "-C", world / "deltas" / "signs", "-cf", "-", "."]
    with service(world, tmp_path) as at:
        assert put(at, "support", subprocess.run(command, capture_output=True, check=True).stdout).status_code == 201
        gnu = packed(world / "deltas" / "ranks", form=tarfile.GNU_FORMAT)
        assert put(at, "ranks", gnu).status_code == 201


def test_only_an_admin_key_may_push(world, tmp_path):
    with service(world, tmp_path) as at:
        for key, status in (("tenant", 403), (None, 401)):
            with at.live.client(key) as client:
                assert client.put("/admin/artifacts/new", content=b"").status_code == status
        assert left(at.deltas) == []


ODD = {
    "above": [(member("../evil"), b"x")],
    "below": [(member("sub/delta_config.json"), b"x")],
    "absolute": [(member("/etc/passwd"), b"x")],
    "unknown": [(member("run.py"), b"x")],
    "pickled": [(member("delta_model.bin"), b"x")],
    "shard of nothing": [(member("delta_model-1-of-2.safetensors"), b"x")],
    "link": [(member("tokenizer.json", tarfile.SYMTYPE, "/etc/passwd"), b"")],
    "hard link": [(member("vocab.json", tarfile.LNKTYPE, "delta_config.json"), b"")],
    "device": [(member("merges.txt", tarfile.CHRTYPE), b"")],
    "folder": [(member("sub", tarfile.DIRTYPE), b"")],
    "twice": [(member("delta_config.json"), b"{}")],
}


@pytest.mark.parametrize("more", ODD.values(), ids=ODD)
def test_other_files_than_an_artifacts_are_refused_and_nothing_is_left(world, tmp_path, more):
    with service(world, tmp_path) as at:
        before = sorted(tmp_path.iterdir())
        refused = put(at, "support", packed(world / "deltas" / "signs", more=more))
        assert refused.status_code == 400 and refused.json()["error"]["code"], refused.text
        assert left(at.deltas) == [] and sorted(tmp_path.iterdir()) == before


def test_what_is_no_archive_cut_off_or_of_another_kind_is_refused(world, tmp_path):
    whole = packed(world / "deltas" / "signs")
    broken = bytearray(whole)
    broken[10] ^= 1  # of the first name, so that the header's sum is wrong
    long = packed(world / "deltas" / "signs", more=[(member("x" * 200), b"")], form=tarfile.PAX_FORMAT)
    with service(world, tmp_path) as at:
        bodies = (
            b"",
            b"PK\3\4" + whole[4:],
            whole[: len(whole) // 2],
            whole[:700],
            bytes(broken),
            long,
            whole + b"x" * 512,
        )
        for body in bodies:
            assert put(at, "support", body).status_code == 400 and left(at.deltas) == []
        for name in ("..", ".hidden", "a%2Fb", "base", "x" * 129):
            assert put(at, name, whole).status_code in (400, 404, 409)
        assert left(at.deltas) == []


def test_an_artifact_that_was_altered_or_is_of_another_base_or_against_policy_is_refused(world, tmp_path):
    altered = tmp_path / "altered"
    shutil.copytree(world / "deltas" / "signs", altered)
    payload = altered / "delta_model.safetensors"
    content = bytearray(payload.read_bytes())
    content[-9] ^= 1
    payload.write_bytes(content)
    with service(world, tmp_path, codecs=["bitdelta"]) as at:
        for folder, code, says in (
            (altered, "artifact_refused", "was altered"),
            (world / "deltas" / "stranger", "artifact_refused", "not the base"),
            (world / "deltas" / "ranks", "not_admitted", "policy allows bitdelta"),
        ):
            refused = put(at, "support", packed(folder)).json()["error"]
            assert refused["code"] == code and says in refused["message"] and str(tmp_path) not in refused["message"]
        lacking = put(at, "support", packed(world / "deltas" / "signs", leave_out=["delta_config.json"]))
        assert lacking.status_code == 422
        assert left(at.deltas) == [] and at.log.recent()[0]["name"] == "support"


def test_what_the_disk_does_not_give_back_is_to_be_sent_again(world, tmp_path, monkeypatch):
    def broken(self, name):
        raise UnreadableError(f"{self.path} cannot be read (Input/output error); check the disk.")

    monkeypatch.setattr(DeltaArtifact, "terms", broken)
    with service(world, tmp_path) as at:
        refused = put(at, "support", packed(world / "deltas" / "signs"))
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5") and left(at.deltas) == []
        assert str(tmp_path) not in refused.text


def test_what_a_statement_lacks_is_said_without_the_place_where_it_came_in(world, tmp_path):
    (tmp_path / "signer.pem.pub").write_bytes((world / "signer.pem.pub").read_bytes())
    rules = {"public_keys": ["signer.pem.pub"], "at_most": {"attack": 0.1}}
    with service(world, tmp_path, attestation=rules) as at:
        body = packed(world / "deltas" / "signs", more=[(member("attestation.json"), b"{")])
        refused = put(at, "support", body).json()["error"]
        assert refused["code"] == "not_admitted" and refused["message"].startswith("support.attestation.json ")
        assert left(at.deltas) == []


def test_too_much_is_refused_before_it_is_written(world, tmp_path, monkeypatch):
    body = packed(world / "deltas" / "signs")
    with service(world, tmp_path, settings=ServiceSettings(max_upload_bytes=len(body)), max_bytes=len(body) // 2) as at:
        assert put(at, "support", body + bytes(512)).status_code == 413  # by its length, before it is read
        chunks = (body[i : i + 999] for i in range(0, len(body), 999))
        refused = put(at, "support", chunks)  # by policy, from the header of a file
        assert refused.status_code == 413 and "bytes" in refused.json()["error"]["message"]
        endless = (bytes(1 << 16) for _ in range(1 + len(body) // (1 << 16)))
        assert put(at, "support", endless).status_code == 413
        assert left(at.deltas) == []
    monkeypatch.setattr(arrival, "_MOST_BESIDE", 100)
    with service(world, tmp_path / "other") as at:
        assert "README.md has" in put(at, "support", body).json()["error"]["message"]
        monkeypatch.setattr(arrival, "_MOST_BESIDE", 1 << 20)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        assert "has room for 10" in put(at, "support", body).json()["error"]["message"]
        assert left(at.deltas) == []


def test_a_disk_that_is_full_leaves_nothing(world, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, os.strerror(28))

    with service(world, tmp_path) as at:
        monkeypatch.setattr(arrival.Arrival, "feed", full)
        refused = put(at, "support", packed(world / "deltas" / "signs"))
        assert refused.status_code == 409 and "No space left" in refused.json()["error"]["message"]
        assert left(at.deltas) == []


def test_a_client_that_goes_leaves_nothing_and_the_name_is_free(world, tmp_path):
    body = packed(world / "deltas" / "signs")
    with service(world, tmp_path) as at:
        host, port = at.live.server.servers[0].sockets[0].getsockname()
        with socket.create_connection((host, port)) as peer:
            head = "PUT /admin/artifacts/support HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer admin\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            peer.sendall(head.encode() + body[: len(body) // 2])
            wait_until(lambda: (at.deltas / ".incoming").is_dir() and list((at.deltas / ".incoming").iterdir()))
            assert put(at, "support", body).status_code == 409  # while the first is on its way
        wait_until(lambda: not list((at.deltas / ".incoming").iterdir()))
        assert left(at.deltas) == [] and put(at, "support", body).status_code == 201


def test_what_a_killed_service_left_is_cleared_when_it_is_old(world, tmp_path):
    with service(world, tmp_path) as at:
        for name, age in (("old", 2 * 86_400), ("young", 60)):
            folder = at.deltas / ".incoming" / name
            folder.mkdir(parents=True)
            os.utime(folder, (time.time() - age,) * 2)
        assert put(at, "support", packed(world / "deltas" / "signs")).status_code == 201
        assert [path.name for path in (at.deltas / ".incoming").iterdir()] == ["young"]


def test_an_artifact_stands_beside_no_other_statement_than_its_own(world, tmp_path, monkeypatch):
    with service(world, tmp_path) as at:
        stale = at.deltas / "support.attestation.json"
        stale.write_text("of another")
        with monkeypatch.context() as patch:
            real = arrival.Path.rename

            def full(self, target):
                if target == at.deltas / "support":
                    raise OSError(28, os.strerror(28))
                return real(self, target)

            patch.setattr(arrival.Path, "rename", full)
            assert put(at, "support", packed(world / "deltas" / "signs")).status_code == 409
        assert stale.read_text() == "of another"
        assert put(at, "support", packed(world / "deltas" / "signs")).status_code == 201
        assert left(at.deltas) == [".removed", "support"]
        assert (at.deltas / ".removed" / "support-1.attestation.json").read_text() == "of another"


def test_a_name_that_is_that_of_a_statement_is_no_tenants_and_a_folder_that_has_it_stays(world, tmp_path):
    name = "support.attestation.json"
    with service(world, tmp_path) as at:
        refused = put(at, name, packed(world / "deltas" / "ranks"))
        assert refused.status_code == 400 and "signed statement" in refused.json()["error"]["message"]
        shutil.copytree(world / "deltas" / "ranks", at.deltas / name)
        asked = at.client.post("/v1/completions", json={"model": name, "prompt": "w5", "max_tokens": 2})
        assert asked.status_code == 404
        assert at.client.put(f"/admin/deltas/{name}").status_code == 400
        assert put(at, "support", packed(world / "deltas" / "signs")).status_code == 201
        assert left(at.deltas) == ["support", name]
        assert at.client.delete("/admin/deltas/support").status_code == 200
        assert left(at.deltas) == [".removed", name]


def test_what_was_pushed_and_never_asked_can_be_unloaded(world, tmp_path):
    load, unload = {"lora_name": "support", "lora_path": "support"}, "/v1/unload_lora_adapter"
    question = {"model": "support", "prompt": "w5", "max_tokens": 2}
    with service(world, tmp_path) as at:
        assert put(at, "support", packed(world / "deltas" / "signs")).status_code == 201
        assert at.client.post(unload, json={"lora_name": "support"}).status_code == 200
        assert at.client.post("/v1/completions", json=question).status_code == 404
        assert at.client.post(unload, json={"lora_name": "support"}).status_code == 404
        assert at.client.post("/v1/load_lora_adapter", json=load).status_code == 200
        assert at.client.post("/v1/completions", json=question).status_code == 200
        assert at.client.post(unload, json={"lora_name": "support"}).status_code == 200
        shutil.rmtree(at.deltas / "support")  # by hand, and something else is pushed under the name
        assert put(at, "support", packed(world / "deltas" / "ranks")).status_code == 201
        assert at.client.post("/v1/completions", json=question).status_code == 200


def test_push_sends_an_artifact_with_its_statement_and_says_what_the_service_says(world, tmp_path, monkeypatch):
    source = tmp_path / "support"
    shutil.copytree(world / "deltas" / "signs", source)
    (tmp_path / "support.attestation.json").write_text("{}")
    (source / ".cache").mkdir()
    monkeypatch.setenv("DELTAKEEPER_KEY", "admin")
    runner = CliRunner()
    with service(world, tmp_path / "there") as at:
        made = runner.invoke(cli, ["push", str(source), "--to", at.live.url])
        assert made.exit_code == 0 and "as support" in made.output, made.output
        assert left(at.deltas) == ["support", "support.attestation.json"]
        taken = runner.invoke(cli, ["push", str(source), "--to", at.live.url, "--name", "support"])
        assert taken.exit_code != 0 and "is taken" in str(taken.output) + str(taken.exception)
        url = at.live.url
    for words in (["--to", url], [], ["org/name", "--to", url], ["--to", "http://["]):
        assert runner.invoke(cli, ["push", str(source), *words]).exit_code != 0
