import base64
import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_runs import ARMS, run_cells, write_run

from deltakeeper import compress
from deltakeeper.artifact import MANIFEST_NAME, open_artifact
from deltakeeper.attestation import attest, make_keys, verify_statement
from deltakeeper.attestation.envelope import MAX_BYTES, PAYLOAD_TYPE, pre_authentication, seal
from deltakeeper.attestation.keys import PASSPHRASE, key_id, read_private_key, read_public_key
from deltakeeper.attestation.statement import PREDICATE_TYPE
from deltakeeper.attestation.strict_json import canonical
from deltakeeper.errors import AttestationError
from deltakeeper.testing import write_pair

DATE = datetime(2026, 1, 31, 12, tzinfo=UTC)
NOW = DATE + timedelta(days=10)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run that measured an artifact, a pair of keys, and a statement."""
    here = tmp_path_factory.mktemp("attested")
    base, tuned = write_pair("llama", here)
    compress(base, tuned, here / "delta", "bitdelta")
    sha = open_artifact(here / "delta").manifest_sha256
    cells = [
        replace(c, artifact=sha, recipe="ab" * 32)
        if (c.variant, c.seed) == ("fair", 1)
        else replace(c, recipe="ab" * 32)
        for c in run_cells(attacks={"prefix": "alignment"}, seeds=(0, 1), n=40)
    ]
    write_run(here / "run", cells)
    make_keys(here / "key.pem")
    attest(here / "run", here / "key.pem", here / "statement.json", artifact=here / "delta", date=DATE)
    return here


def check(here, statement=None, artifact=None, key=None, **options):
    return verify_statement(
        statement or here / "statement.json",
        artifact or here / "delta",
        key or here / "key.pem.pub",
        **{"now": NOW, **options},
    )


def refused(says, *arguments, **options):
    with pytest.raises(AttestationError, match=says) as error:
        check(*arguments, **options)
    assert str(error.value).count("\n") == 0 and str(error.value).endswith(".")


def resealed(here, path, change):
    """A statement changed before it was signed with the right key."""
    value = json.loads(payload_of(here / "statement.json"))
    change(value)
    path.write_bytes(seal(canonical(value), read_private_key(here / "key.pem")))
    return path


def payload_of(path):
    return base64.b64decode(json.loads(path.read_bytes())["payload"])


@pytest.fixture
def copy(world, tmp_path):
    shutil.copytree(world / "delta", tmp_path / "delta")
    return tmp_path / "delta"


def test_a_statement_holds_and_says_what_was_measured(world):
    found = check(world, max_age=timedelta(days=11))
    predicate = found.predicate
    assert found.date == DATE and found.manifest_sha256 == open_artifact(world / "delta").manifest_sha256
    assert predicate.measurement.variant == "fair" and predicate.measurement.seeds == (1,)
    assert predicate.measurement.metrics["attack"].value == pytest.approx(0.4)
    assert predicate.measurement.metrics["attack"].low < 0.4 < predicate.measurement.metrics["attack"].high
    assert predicate.measurement.recipe_sha256 == "ab" * 32
    assert [one.seeds for one in predicate.study] == [(0, 1)]
    assert predicate.evidence == "non-adaptive" and predicate.prompts["goal"].count == 40
    assert set(found.files) == {f.name for f in (world / "delta").iterdir()}
    assert predicate.judges[0].name == "ours" and predicate.tool.name == "deltakeeper"


@pytest.mark.parametrize(("reached", "evidence"), [(0.9, "adaptive"), (0.02, "non-adaptive")])
def test_only_an_attack_that_worked_is_evidence_against_those_who_know_the_codec(world, tmp_path, reached, evidence):
    sha = open_artifact(world / "delta").manifest_sha256
    plain = [
        replace(c, artifact=sha) if (c.variant, c.seed) == ("fair", 1) else c
        for c in run_cells(attacks={"prefix": "alignment"}, seeds=(0, 1), n=40)
    ]
    arms = {name: ARMS[name] for name in ("base", "tuned", "fair")}
    arms |= {"tuned": ("tuned", reached, 0.8, None), "fair": ("codec", reached, 0.7, 20_000_000)}
    known = run_cells(arms, {"known": "alignment"}, (0, 1), n=40)
    write_run(tmp_path / "run", [*plain, *(replace(c, adaptive={"kind": "straight_through"}) for c in known)])
    said = attest(tmp_path / "run", world / "key.pem", tmp_path / "said.json", artifact=world / "delta").predicate
    assert said.evidence == evidence
    assert {one.attack: one.metrics["attack"].value for one in said.study}["known"] == pytest.approx(reached, abs=0.02)


def test_the_same_run_gives_the_same_payload(world, tmp_path):
    attest(world / "run", world / "key.pem", tmp_path / "again.json", artifact=world / "delta", date=DATE)
    assert payload_of(tmp_path / "again.json") == payload_of(world / "statement.json")


def test_other_libraries_read_the_envelope(world):
    raw = (world / "statement.json").read_bytes()
    dsse = pytest.importorskip("securesystemslib.dsse")
    from securesystemslib.signer import SSlibKey

    key = SSlibKey.from_crypto(read_public_key(world / "key.pem.pub"), key_id(read_public_key(world / "key.pem.pub")))
    envelope = dsse.Envelope.from_dict(json.loads(raw))
    assert envelope.payload_type == PAYLOAD_TYPE and envelope.pae() == pre_authentication(envelope.payload)
    assert envelope.verify([key], 1)


def test_sigstore_reads_envelope_and_statement(world):
    dsse = pytest.importorskip("sigstore.dsse")
    envelope = dsse.Envelope._from_json((world / "statement.json").read_bytes())
    payload = dsse._verify(read_public_key(world / "key.pem.pub"), envelope)
    assert dsse.Statement(payload)._inner.predicate_type == PREDICATE_TYPE


# -- the artifact --


@settings(max_examples=30)
@given(st.data())
def test_any_altered_byte_of_any_file_is_refused(world, data):
    files = sorted(f for f in (world / "delta").rglob("*") if f.is_file())
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= data.draw(st.integers(1, 255))
    try:
        file.write_bytes(bytes(changed))
        with pytest.raises(AttestationError):
            check(world)
    finally:
        file.write_bytes(whole)
    check(world)


@pytest.mark.parametrize("length", [0, 1, 100])
def test_a_truncated_file_is_refused(world, copy, length):
    for file in copy.iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[:length])
        refused(f"{file.name}", world, artifact=copy)
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["extra.txt", ".gitattributes", "sub/folder/file", "Model.safetensors"])
def test_an_extra_file_is_refused(world, copy, name):
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_text("x")
    refused(f"{name} is not among the attested files", world, artifact=copy)


def test_a_missing_file_is_refused(world, copy):
    gone = next(f for f in copy.iterdir() if f.name != MANIFEST_NAME)
    gone.unlink()
    refused(f"{gone.name} is attested and missing", world, artifact=copy)
    (copy / MANIFEST_NAME).unlink()
    refused(f"holds no {MANIFEST_NAME}", world, artifact=copy)


def test_links_to_folders_and_to_nothing_are_refused_and_links_to_files_followed(world, copy, tmp_path):
    (copy / "inner").symlink_to(tmp_path)
    refused("is a link to a folder", world, artifact=copy)
    (copy / "inner").unlink()
    (copy / "nothing").symlink_to(tmp_path / "not-there")
    refused("nothing is no file", world, artifact=copy)
    (copy / "nothing").unlink()
    moved = next(f for f in copy.iterdir() if f.name != MANIFEST_NAME)
    shutil.move(moved, tmp_path / "blob")
    moved.symlink_to(tmp_path / "blob")
    check(world, artifact=copy)


def test_another_artifact_and_one_of_another_base_have_sentences_of_their_own(world, tmp_path):
    compress(world / "base", world / "tuned", tmp_path / "other", "bitdelta:bits=2")
    refused("is not the attested artifact", world, artifact=tmp_path / "other")
    base, tuned = write_pair("llama", tmp_path / "elsewhere", seed=5)
    compress(base, tuned, tmp_path / "foreign", "bitdelta")
    refused("is of a delta of the base", world, artifact=tmp_path / "foreign")
    refused("the base here is ffffffffffff", world, base_root="f" * 64)
    root = open_artifact(world / "delta").manifest.base.root
    assert check(world, base_root=root).base_root == root


# -- the statement --


@settings(max_examples=60)
@given(st.data())
def test_any_altered_byte_of_the_statement_is_refused(world, data):
    whole = (world / "statement.json").read_bytes()
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path = world / "changed.json"
    path.write_bytes(bytes(changed))
    with pytest.raises(AttestationError):
        check(world, statement=path)


def leaves(value, path=()):
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))
    else:
        yield path


@settings(max_examples=40)
@given(st.data())
def test_any_changed_field_breaks_the_signature(world, tmp_path_factory, data):
    envelope = json.loads((world / "statement.json").read_bytes())
    value = json.loads(base64.b64decode(envelope["payload"]))
    *parents, last = data.draw(st.sampled_from(sorted(leaves(value), key=str)))
    target = value
    for key in parents:
        target = target[key]
    old = target[last]
    target[last] = data.draw(
        st.one_of(st.text(max_size=5), st.integers(), st.none(), st.booleans()).filter(lambda x: x != old)
    )
    envelope["payload"] = base64.b64encode(canonical(value)).decode()
    path = world / "forged.json"
    path.write_bytes(canonical(envelope) + b"\n")
    refused("its signature does not hold", world, statement=path)


@pytest.mark.parametrize("length", [0, 1, 50, -1, -2])
def test_a_truncated_statement_is_refused(world, tmp_path, length):
    whole = (world / "statement.json").read_bytes().rstrip(b"\n")
    (tmp_path / "cut.json").write_bytes(whole[:length])
    refused("cannot be read as JSON", world, statement=tmp_path / "cut.json")


def test_what_is_no_statement_at_all_is_refused(world, tmp_path):
    path = tmp_path / "odd.json"
    refused("is no statement", world, statement=tmp_path / "absent.json")
    for text, says in (
        ("[]", "no DSSE envelope"),
        ('{"payload":"","payloadType":"x","signatures":[]}', "no in-toto statement"),
        ('{"payload":"","payload":"","payloadType":"x","signatures":[]}', "a key occurs twice"),
        ('{"a": 1}', "not spelled in the one way"),
        ("NaN", "no JSON number"),
        ("[" * 100_000, "nested too deeply|cannot be read"),
        ("1" * 5_000, "cannot be read"),
    ):
        path.write_text(text)
        refused(says, world, statement=path)
    path.write_bytes(b" " * (MAX_BYTES + 1))
    refused("larger than", world, statement=path)


def test_several_signatures_or_another_spelling_of_base64_are_refused(world, tmp_path):
    envelope = json.loads((world / "statement.json").read_bytes())
    path = tmp_path / "odd.json"

    def write(**changes):
        path.write_bytes(canonical({**envelope, **changes}) + b"\n")

    write(signatures=envelope["signatures"] * 2)
    refused("exactly one signature", world, statement=path)
    write(signatures=[])
    refused("exactly one signature", world, statement=path)
    write(signatures=[{**envelope["signatures"][0], "extra": 1}])
    refused("malformed", world, statement=path)
    write(payload=envelope["payload"] + "\n")
    refused("base64", world, statement=path)
    write(payload=envelope["payload"].replace("=", "") + "!")
    refused("base64", world, statement=path)
    write(payloadType="text/plain")
    refused("no in-toto statement", world, statement=path)


def test_a_signed_statement_of_another_kind_or_version_is_refused(world, tmp_path):
    path = tmp_path / "signed.json"

    def sealed(**changes):
        return resealed(world, path, lambda value: value.update(changes))

    refused("use the release that wrote it", world, statement=sealed(predicateType=PREDICATE_TYPE[:-1] + "2"))
    refused("give a statement of deltakeeper", world, statement=sealed(predicateType="https://slsa.dev/provenance/v1"))
    refused("no in-toto Statement v1", world, statement=sealed(_type="https://in-toto.io/Statement/v0.1"))
    refused("extra", world, statement=sealed(extra=1))
    refused("subject", world, statement=sealed(subject=[]))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("predicate", "date"), "yesterday"),
        (("predicate", "date"), "2026-13-31T12:00:00Z"),
        (("predicate", "artifact", "manifest_sha256"), "AB" * 32),
        (("predicate", "artifact", "bytes"), -1),
        (("predicate", "evidence"), "excellent"),
        (("predicate", "measurement", "metrics", "attack"), 0.1),
        (("subject", 0, "name"), "../outside"),
        (("subject", 0, "name"), "/etc/passwd"),
        (("subject", 0, "digest", "sha256"), "short"),
    ],
)
def test_a_signed_statement_with_a_malformed_field_is_refused(world, tmp_path, place, value):
    def change(whole):
        *parents, last = place
        for key in parents:
            whole = whole[key]
        whole[last] = value

    refused(f"{place[-1]}|{place[0]}", world, statement=resealed(world, tmp_path / "odd.json", change))


def test_a_statement_that_contradicts_itself_is_refused(world, tmp_path):
    def other_manifest(value):
        value["predicate"]["artifact"]["manifest_sha256"] = "0" * 64

    refused("contradicts itself", world, statement=resealed(world, tmp_path / "odd.json", other_manifest))

    def other_base(value):
        value["predicate"]["artifact"]["base_root"] = "0" * 64

    refused(
        "is of a delta of the base 000000000000", world, statement=resealed(world, tmp_path / "odd.json", other_base)
    )


def test_the_signature_is_checked_before_what_it_covers_is_read(world, tmp_path):
    make_keys(tmp_path / "mine.pem")
    (tmp_path / "odd.json").write_bytes(seal(b"no statement", read_private_key(tmp_path / "mine.pem")))
    refused("signed with another key", world, statement=tmp_path / "odd.json")
    refused("cannot be read as JSON", world, statement=tmp_path / "odd.json", key=tmp_path / "mine.pem.pub")


def test_age_and_future(world):
    check(world, max_age=timedelta(days=10))
    refused("older than the 9 days allowed", world, max_age=timedelta(days=9))
    refused("older than the 12 hours allowed", world, max_age=timedelta(hours=12))
    refused("dated in the future", world, now=DATE - timedelta(hours=1))
    check(world, now=DATE - timedelta(minutes=2))


# -- keys --


def test_a_statement_of_another_key_is_refused_even_if_it_borrows_the_name(world, tmp_path):
    make_keys(tmp_path / "other.pem")
    refused("signed with another key", world, key=tmp_path / "other.pem.pub")
    envelope = json.loads((world / "statement.json").read_bytes())
    envelope["signatures"][0]["keyid"] = key_id(read_public_key(tmp_path / "other.pem.pub"))
    (tmp_path / "odd.json").write_bytes(canonical(envelope) + b"\n")
    refused("its signature does not hold", world, statement=tmp_path / "odd.json", key=tmp_path / "other.pem.pub")


def test_a_private_key_is_its_owner_s_and_never_overwritten(tmp_path):
    private, public = make_keys(tmp_path / "keys" / "a.pem")
    assert private.stat().st_mode & 0o777 == 0o600 and public.name == "a.pem.pub"
    before = private.read_bytes()
    with pytest.raises(AttestationError, match="never overwritten"):
        make_keys(private)
    private.unlink()
    with pytest.raises(AttestationError, match=r"a\.pem\.pub is there already"):
        make_keys(private)
    assert not private.exists() and sorted(f.name for f in private.parent.iterdir()) == ["a.pem.pub"]
    private.write_bytes(before)
    private.chmod(0o640)
    with pytest.raises(AttestationError, match="can be read by others"):
        read_private_key(private)


def test_a_passphrase_comes_from_the_environment_and_is_told_to_no_one(world, tmp_path, monkeypatch):
    monkeypatch.setenv(PASSPHRASE, "open sesame")
    private, public = make_keys(tmp_path / "locked.pem")
    assert b"ENCRYPTED" in private.read_bytes()
    attest(world / "run", private, tmp_path / "s.json", artifact=world / "delta", date=DATE)
    check(world, statement=tmp_path / "s.json", key=public)
    monkeypatch.setenv(PASSPHRASE, "wrong words")
    with pytest.raises(AttestationError, match="does not open it") as error:
        read_private_key(private)
    assert "wrong words" not in str(error.value)
    monkeypatch.delenv(PASSPHRASE)
    with pytest.raises(AttestationError, match=f"set {PASSPHRASE}"):
        read_private_key(private)
    monkeypatch.setenv(PASSPHRASE, "for another key")
    read_private_key(world / "key.pem")  # that is not locked


def test_keys_of_other_kinds_are_refused(world, tmp_path):
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    for key in (ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()):
        path = tmp_path / "odd.pem"
        path.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
        path.chmod(0o600)
        with pytest.raises(AttestationError, match="P-256"):
            read_private_key(path)
        spki = form.PublicFormat.SubjectPublicKeyInfo
        path.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, spki))
        refused("P-256", world, key=path)
    refused("is a private key", world, key=world / "key.pem")
    path.write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    refused("no public key in PEM", world, key=path)
    path.write_bytes(b"x" * 20_000)
    refused("which no key is", world, key=path)
    refused("is no key file", world, key=tmp_path / "absent")
    with pytest.raises(AttestationError, match="no private key in PEM"):
        read_private_key(world / "key.pem.pub" if (world / "key.pem.pub").chmod(0o600) is None else path)


# -- making --


def test_an_artifact_that_was_not_measured_is_not_attested(world, tmp_path):
    compress(world / "base", world / "tuned", tmp_path / "other", "bitdelta:bits=2")
    with pytest.raises(AttestationError, match="did not measure"):
        attest(world / "run", world / "key.pem", tmp_path / "s.json", artifact=tmp_path / "other")
    assert not (tmp_path / "s.json").exists()


def test_an_altered_artifact_is_not_attested(world, copy, tmp_path):
    from deltakeeper.errors import DeltakeeperError

    weights = next(copy.glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(bytes(raw))
    with pytest.raises(DeltakeeperError, match="altered"):
        attest(world / "run", world / "key.pem", tmp_path / "s.json", artifact=copy)
    assert not (tmp_path / "s.json").exists()


def test_the_run_s_own_artifact_is_found_by_its_variant(world, tmp_path):
    with pytest.raises(AttestationError, match="no longer holds the artifact"):
        attest(world / "run", world / "key.pem", tmp_path / "s.json", variant="fair")
    shutil.copytree(world / "run", tmp_path / "run")
    shutil.copytree(world / "delta", tmp_path / "run" / "deltas" / "prefix-1-fair")
    found = attest(tmp_path / "run", world / "key.pem", tmp_path / "s.json", variant="fair", attack="prefix", seed=1)
    assert found.predicate.measurement.variant == "fair"
    check(world, statement=tmp_path / "s.json", now=None)
    for options, says in (
        ({}, "give the folder of an artifact, or the variant"),
        ({"variant": "good"}, "no measured artifact has the variant 'good'; there are fair"),
        ({"variant": "fair", "seed": 0}, "no measured artifact has the seed 0; there are 1"),
    ):
        with pytest.raises(AttestationError, match=says):
            attest(tmp_path / "run", world / "key.pem", tmp_path / "s.json", **options)


def test_a_statement_is_never_written_into_the_artifact(world, copy):
    with pytest.raises(AttestationError, match="lies in the artifact's folder"):
        attest(world / "run", world / "key.pem", copy / "statement.json", artifact=copy)
    assert not (copy / "statement.json").exists()


def test_a_signature_of_model_signing_covers_the_same_files(world, copy, tmp_path):
    pytest.importorskip("OpenSSL", reason="model-signing 1.1.1 needs pyOpenSSL")
    from deltakeeper.attestation.model_signature import sign_folder, verify_folder

    signature = sign_folder(copy, world / "key.pem", tmp_path / "model.sig")
    verify_folder(copy, signature, world / "key.pem.pub")
    (copy / ".gitignore").write_text("x")
    with pytest.raises(AttestationError, match="does not hold"):
        verify_folder(copy, signature, world / "key.pem.pub")
