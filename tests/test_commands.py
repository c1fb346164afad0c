"""The command line as a new user meets it: output, exit statuses, and one sentence an error."""

from __future__ import annotations

import json
import sys

import pytest

import deltakeeper
from deltakeeper import cli
from deltakeeper.testing import write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base, tuned = write_pair("llama", folder)
    other, _ = write_pair("llama", folder / "other", seed=5)
    return base, tuned, other


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["deltakeeper", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


def test_compress_inspect_verify_apply(run, pair, tmp_path):
    base, tuned, _ = pair
    delta = tmp_path / "delta"
    code, out, _ = run("compress", base, tuned, "-o", delta, "--codec", "bitdelta:bits=2")
    assert code == 0 and "times smaller" in out and "bits a weight" in out
    code, out, _ = run("inspect", delta)
    assert code == 0 and "bitdelta:bits=2" in out and "signs" in out
    code, out, _ = run("inspect", delta, "--tensors")
    assert code == 0 and "model.layers.1.mlp.up_proj.weight" in out
    code, out, _ = run("verify", delta, "--base", base, "--tuned", tuned)
    assert code == 0 and "whole" in out and "very bytes" in out and "relative error" in out
    code, out, _ = run("apply", base, delta, "-o", tmp_path / "again")
    assert code == 0 and (tmp_path / "again" / "model.safetensors").is_file()


def test_json_output_is_json_and_nothing_else(run, pair, tmp_path):
    base, tuned, _ = pair
    delta = tmp_path / "delta"
    _, out, err = run("compress", base, tuned, "-o", delta, "--json")
    assert json.loads(out)["codec"] == "bitdelta" and err == ""
    on_disk = sum(
        (delta / n).stat().st_size for n in ("delta_config.json", "delta_model.safetensors", "delta_report.json")
    )
    assert json.loads(run("inspect", delta, "--json")[1])["bytes"] == on_disk
    assert json.loads(run("verify", delta, "--base", base, "--json")[1])["ok"] is True
    assert "bitdelta" in json.loads(run("codecs", "--json")[1])


def test_a_failed_verification_is_status_1(run, pair, tmp_path):
    base, tuned, other = pair
    run("compress", base, tuned, "-o", tmp_path / "delta")
    code, out, _ = run("verify", tmp_path / "delta", "--base", other)
    assert code == 1 and "Wrong: tensor" in out
    code, out, _ = run("verify", tmp_path / "delta", "--base", other, "--json")
    assert code == 1 and json.loads(out)["ok"] is False


def test_a_damaged_artifact_is_status_1_and_no_artifact_is_status_2(run, pair, tmp_path):
    base, tuned, _ = pair
    run("compress", base, tuned, "-o", tmp_path / "delta")
    payload = tmp_path / "delta" / "delta_model.safetensors"
    payload.write_bytes(payload.read_bytes()[:-100])
    code, out, _ = run("verify", tmp_path / "delta", "--base", base)
    assert code == 1 and "Wrong: " in out and "truncated" in out
    code, out, _ = run("verify", tmp_path / "delta", "--base", base, "--json")
    assert code == 1 and json.loads(out)["problems"]
    assert run("verify", tmp_path, "--base", base)[0] == 2


def test_an_artifact_that_is_larger_says_so(run, pair, tmp_path):
    _, out, _ = run("compress", *pair[:2], "-o", tmp_path / "delta", "--codec", "shrink")
    assert "times larger than" in out and "smaller" not in out


def test_noise_and_missing_calibration_are_told(run, pair, tmp_path):
    _, out, _ = run("compress", *pair[:2], "-o", tmp_path / "noisy", "--codec", "dare")
    assert "larger than the delta itself" in out
    _, out, _ = run("compress", *pair[:2], "-o", tmp_path / "delta", "--codec", "deltazip+svd:rank=2")
    assert "Not calibrated" in out and "deltazip fell back" in out
    _, out, _ = run("compress", *pair[:2], "-o", tmp_path / "plain")
    assert "Not calibrated" not in out and "larger" not in out


def test_a_budget_needs_no_rank(run, pair, tmp_path):
    code, out, _ = run("compress", *pair[:2], "-o", tmp_path / "delta", "--codec", "svd", "--target-ratio", 3)
    assert code == 0 and "svd" in out


def test_the_version(run):
    assert run("--version")[1] == f"deltakeeper {deltakeeper.__version__}\n"
    assert "Compress, measure and serve" in run("--help")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("compress", "{base}", "{tuned}", "-o", "{out}", "--text", "{base}/x.txt"), "leave out the text"),
        (("compress", "{base}", "{tuned}", "-o", "{out}", "--codec", "svd"), "needs exactly one of 'rank'"),
        (
            ("compress", "{base}", "{tuned}", "-o", "{out}", "--target-size", "9", "--embeddings", "dense"),
            "do not store embeddings and norms dense",
        ),
        (("compress", "/nowhere", "{tuned}", "-o", "{out}"), "there is no model folder /nowhere"),
        (("compress", "{base}", "{tuned}", "-o", "{out}", "--codec", "bitdelt"), "did you mean"),
        (("compress", "{base}", "{tuned}", "-o", "{out}", "--codec", "bitdelta:bits=9"), "bits"),
        (("compress", "{base}", "{tuned}", "-o", "{out}", "--codec", "bitdelta:bit=1"), "did you mean"),
        (("inspect", "{base}"), "give the folder of a delta artifact"),
        (("apply", "{base}", "{base}", "-o", "{out}"), "give the folder of a delta artifact"),
        (("demo", "--attack", "nonsense", "-o", "{out}"), "there is no recipe 'nonsense'"),
    ],
)
def test_errors_are_one_sentence_status_2_and_leave_nothing(run, pair, tmp_path, arguments, said):
    places = {"base": pair[0], "tuned": pair[1], "out": tmp_path / "out"}
    code, out, err = run(*(a.format(**places) for a in arguments))
    assert code == 2
    assert err.startswith("deltakeeper: ") and said in err and err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [("compress",), ("compress", "a", "b"), ("nonsense",), ("verify", "x", "--bse", "y")]
)
def test_wrong_usage_is_status_2(run, arguments):
    assert run(*arguments)[0] == 2


@pytest.mark.parametrize("verb", ["compress", "inspect", "verify", "apply", "codecs", "demo"])
def test_every_verb_has_help_with_an_example(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0 and "Example: deltakeeper" in out


def test_an_interruption_is_status_130(run, pair, tmp_path, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["deltakeeper.compress"], "compress", interrupt)
    code, _, err = run("compress", pair[0], pair[1], "-o", tmp_path / "delta")
    assert code == 130 and "interrupted" in err


def test_codecs_lists_every_codec(run):
    from deltakeeper.codecs import CODECS

    _, out, _ = run("codecs")
    assert all(name in out for name in CODECS)
