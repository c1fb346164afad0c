"""What a policy file may say, and what an artifact's files must show."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from admission_parts import DATE, write_judge, write_policy, write_statement

from deltakeeper.artifact import open_artifact
from deltakeeper.attestation import make_keys
from deltakeeper.errors import AttestationError, DataError
from deltakeeper.live_base import open_base
from deltakeeper.service.admission.inspection import inspect
from deltakeeper.service.admission.policy import Policy, read_policy
from deltakeeper.service.assembly import Plan, assembled

BOUNDS = {"public_keys": ["signer.pem.pub"], "at_most": {"attack": 0.1}, "at_least": {"skill": 0.8}}


def look(here, name="signs", root=None, now=DATE, **policy):
    artifact = open_artifact(here / "deltas" / name)
    file = read_policy(write_policy(here, **policy))
    return inspect(file, artifact, root or open_artifact(here / "deltas" / "signs").manifest.base.root, now)


def said(finding):
    assert all(reason.endswith(".") and "\n" not in reason for reason in finding.reasons)
    return " ".join(finding.reasons)


def test_an_empty_policy_asks_for_the_served_base_alone(here):
    (here / "none.yaml").write_text("")
    assert read_policy(here / "none.yaml").policy == Policy()
    assert look(here).verdict == "admitted"
    assert "is for the base" in said(look(here, "stranger"))
    assert look(here, root="ab" * 32).verdict == "refused"


def test_a_policy_that_names_another_base_admits_nothing_of_it(here, world):
    """The base that is served decides in any case: a policy may ask for less, and not for something else."""
    root = open_artifact(here / "deltas" / "stranger").manifest.base.root
    assert "is served" in said(look(here, "stranger", base_root=root))
    write_policy(here, base_root=root)
    plan = Plan(here / "deltas", here / "state.db", here / "log.jsonl", "base", policy=here / "policy.yaml")
    with pytest.raises(DataError, match="it would admit none"), assembled(open_base(world / "base"), plan):
        pass


@pytest.mark.parametrize(
    ("name", "policy", "says"),
    [
        ("signs", {"base_root": "cd" * 32}, "policy asks for cdcdcdcdcdcd"),
        ("ranks", {"codecs": ["bitdelta"]}, "Its codec is 'svd'"),
        ("ranks", {"layouts": ["signs", "dense"]}, "is stored as lowrank"),
        ("signs", {"max_bytes": 1000}, "policy allows 1,000"),
        ("signs", {"max_bytes": "1KiB"}, "policy allows 1,024"),
    ],
)
def test_what_files_show_is_held_against_the_policy(here, name, policy, says):
    finding = look(here, name, **policy)
    assert finding.verdict == "refused" and says in said(finding)


def test_what_a_policy_allows_is_let_in(here):
    policy = {"codecs": ["bitdelta"], "layouts": ["signs"], "max_bytes": "1MiB"}
    assert look(here, **policy).verdict == "admitted"  # norms are stored whole, and are no matrices


def test_a_codec_that_is_claimed_does_not_hide_how_a_matrix_is_stored(here):
    manifest = here / "deltas" / "ranks" / "delta_config.json"
    manifest.write_text(manifest.read_text().replace("svd:rank=8", "bitdelta"))
    assert look(here, "ranks", codecs=["bitdelta"]).verdict == "admitted"
    assert look(here, "ranks", codecs=["bitdelta"], layouts=["signs"]).verdict == "refused"


def test_a_statement_within_bounds_admits(here):
    write_statement(here / "deltas" / "signs", here / "signer.pem")
    finding = look(here, attestation=BOUNDS | {"max_age_days": 30, "evidence": "adaptive"})
    assert finding.verdict == "admitted" and finding.planes is None and not finding.reasons
    assert finding.expires == DATE + timedelta(days=30)


@pytest.mark.parametrize(
    ("measured", "rules", "says"),
    [
        ({"attack": (0.05, 0.0, 0.11)}, {}, "attack is shown to be at most 0.11"),
        ({"skill": (0.9, 0.79, 1.0)}, {}, "skill is shown to be at least 0.79"),
        ({"attack": (None, None, None)}, {}, "attack is not measured"),
        ({}, {"at_most": {"leak": 0.1}}, "leak is not measured"),
        ({"evidence": "non-adaptive"}, {"evidence": "adaptive"}, "who knows the codec"),
        ({"date": DATE - timedelta(days=31)}, {"max_age_days": 30}, "older than the 30 days"),
        ({"date": DATE + timedelta(days=1)}, {}, "dated in the future"),
    ],
)
def test_a_statement_out_of_bounds_refuses_even_where_none_would_do(here, measured, rules, says):
    write_statement(here / "deltas" / "signs", here / "signer.pem", **measured)
    finding = look(here, attestation=BOUNDS | rules, unattested={"planes": 1})
    assert finding.verdict == "refused" and says in said(finding)


def test_it_is_the_end_of_the_interval_that_counts(here):
    write_statement(here / "deltas" / "signs", here / "signer.pem", attack=(0.0, 0.0, 0.3))
    assert look(here, attestation=BOUNDS).verdict == "refused"
    assert look(here, attestation=BOUNDS | {"at_most": {"attack": 0.3}}).verdict == "admitted"


def test_another_key_an_altered_file_and_another_artifact_are_refused(here):
    signs = here / "deltas" / "signs"
    make_keys(here / "other.pem")
    write_statement(signs, here / "other.pem")
    assert "another key" in said(look(here, attestation=BOUNDS))
    both = BOUNDS | {"public_keys": ["signer.pem.pub", "other.pem.pub"]}
    assert look(here, attestation=both).verdict == "admitted"
    (signs / "chat_template.jinja").write_text("obey")
    assert "not among the attested files" in said(look(here, attestation=both))
    statement = signs.with_name("signs.attestation.json")
    statement.rename(signs.with_name("ranks.attestation.json"))
    assert "not the attested artifact" in said(look(here, "ranks", attestation=both))


def test_without_a_statement_it_is_refused_or_dimmed(here):
    assert "no signed statement signs.attestation.json" in said(look(here, attestation=BOUNDS))
    finding = look(here, attestation=BOUNDS, unattested={"planes": 1})
    assert finding.verdict == "quarantined" and finding.planes == 1 and "1 sign plane" in said(finding)
    other = look(here, "ranks", attestation=BOUNDS, unattested={"planes": 1})
    assert other.verdict == "refused" and "stored in no planes" in said(other)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"codec": ["bitdelta"]}, "did you mean 'codecs'"),
        ({"layouts": ["sign"]}, "there is no layout 'sign'"),
        ({"max_bytes": -1}, "max_bytes"),
        ({"unattested": {"planes": 1}}, "attestation must say which counts"),
        ({"attestation": {"public_keys": []}}, "attestation.public_keys"),
        ({"attestation": {"public_keys": ["nobody.pub"]}}, "which is not there"),
        ({"canary": {}}, "it could not fail"),
        ({"canary": {"refusals_at_least": 1.5}}, "canary.refusals_at_least"),
        ({"canary": {"refusals_at_least": 0.5, "drop": 1}}, "unknown key 'canary.drop'"),
        ({"base_root": "abc"}, "base_root"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused_in_one_sentence(here, policy, says):
    write_judge(here, "w1")
    with pytest.raises(DataError, match=says) as error:
        read_policy(write_policy(here, **policy))
    assert "\n" not in str(error.value) and "policy.yaml" in str(error.value)


def test_the_example_in_deploy_can_be_read(here):
    example = Path(__file__).resolve().parents[2] / "deploy" / "policy.yaml"
    shutil.copy2(example, here / "example.yaml")
    policy = read_policy(here / "example.yaml").policy
    assert policy.attestation.max_age.days == 90 and policy.unattested.planes == 1 and policy.canary.count == 32
    assert all(getattr(policy, name) is not None for name in Policy.model_fields if name != "base_root")


def test_files_that_are_no_policy_are_refused(here):
    with pytest.raises(DataError, match="there is no policy"):
        read_policy(here / "absent.yaml")
    (here / "list.yaml").write_text("- a\n")
    with pytest.raises(DataError, match="not a mapping"):
        read_policy(here / "list.yaml")
    with pytest.raises(AttestationError, match="is a private key"):
        read_policy(write_policy(here, attestation=BOUNDS | {"public_keys": ["signer.pem"]}))
