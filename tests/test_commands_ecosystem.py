"""The verbs that speak with other tools: push, pull, import and export-lora, as a user types them."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from deltakeeper import cli
from deltakeeper.compress import compress
from deltakeeper.testing import build_model, write_pair


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ecosystem")
    base, tuned = write_pair("llama", folder)
    compress(base, tuned, folder / "delta", "bitdelta")
    return base, tuned, folder / "delta"


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["deltakeeper", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    """A hub with one artifact, `org/delta`, that takes whatever is pushed."""
    uploads = []
    api = SimpleNamespace(
        create_repo=lambda *_, **__: None,
        create_branch=lambda *_, **__: None,
        upload_folder=lambda **said: uploads.append(said) or SimpleNamespace(commit_url="https://hub/commit"),
    )

    def snapshot_download(name, **_):
        if name != "org/delta":
            raise RuntimeError("401 Client Error.")
        if not (tmp_path / "cache").exists():
            shutil.copytree(made[2], tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return uploads


def test_push_and_pull(run, made, hub, tmp_path):
    code, out, _ = run("push", made[2], "org/delta", "--private", "-m", "hello")
    assert code == 0 and "https://hub/commit" in out and hub[0]["commit_message"] == "hello"
    code, out, _ = run("pull", "org/delta@main", "-o", tmp_path / "pulled")
    assert code == 0 and (tmp_path / "pulled" / "delta_config.json").is_file()
    code, out, err = run("pull", "org/other", "-o", tmp_path / "other")
    assert (code, out) == (2, "") and "the hub did not give org/other (401 Client Error); check" in err
    assert err.count("\n") == 1 and not (tmp_path / "other").exists()


def test_every_verb_takes_an_artifact_from_the_hub(run, made, hub, tmp_path):
    assert run("inspect", "org/delta")[0] == 0
    assert run("verify", "org/delta@main", "--base", made[0])[0] == 0
    assert run("apply", made[0], "org/delta", "-o", tmp_path / "again")[0] == 0
    code, _, err = run("inspect", "./org/delta")
    assert code == 2 and "give the folder of a delta artifact" in err
    assert run("export-lora", "org/delta", "--base", made[0], "-o", tmp_path / "a", "--rank", 2, "--drop-rest")[0] == 0


def test_export_lora_says_what_it_cost(run, made, tmp_path):
    base, _, delta = made
    code, out, err = run("export-lora", delta, "--base", base, "-o", tmp_path / "adapter", "--rank", "9")
    assert (code, out) == (2, "") and "--drop-rest" in err and not (tmp_path / "adapter").exists()
    code, out, _ = run(
        "export-lora", delta, "--base", base, "-o", tmp_path / "adapter", "--rank", "9", "--drop-rest", "--uniform-rank"
    )
    assert code == 0 and "rank 9" in out and "--max-lora-rank 16" in out
    assert "Left out: lm_head.weight, an output head." in out and "Left out: model.norm.weight, a norm." in out
    arguments = ("export-lora", delta, "--base", base, "-o", tmp_path / "other", "--rank", "9", "--drop-rest", "--json")
    found = json.loads(run(*arguments)[1])
    assert found["rank"] == 9 and found["vllm_rank"] == 16 and 0 < found["relative_error"] < 1
    assert f"relative error {found['relative_error']:.4f}" in out
    assert "model.layers.0.mlp.up_proj" in found["modules"] and "lm_head.weight" in found["dropped"]


def test_import_reads_adapters_and_bitdelta_files(run, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = build_model("llama")
    model.save_pretrained(tmp_path / "base")
    settings = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    code, out, _ = run("import", tmp_path / "adapter", "--base", tmp_path / "base", "-o", tmp_path / "delta")
    assert code == 0 and "2 tensors changed" in out and "19 are the base's" in out
    torch.save({"model.norm.weight": torch.full((48,), 2.0)}, tmp_path / "diff.pt")
    arguments = ("import", tmp_path / "diff.pt", "--base", tmp_path / "base", "-o", tmp_path / "other", "--json")
    assert json.loads(run(*arguments)[1])["kind"] == "bitdelta"
    code, out, err = run("import", tmp_path / "base", "--base", tmp_path / "base", "-o", tmp_path / "third")
    assert (code, out) == (2, "") and "deltakeeper compress" in err


@pytest.mark.parametrize("verb", ["push", "pull", "import", "export-lora", "verify"])
def test_every_verb_has_help_with_an_example(run, verb):
    code, out, _ = run(verb, "--help")
    assert code == 0 and f"Example: deltakeeper {verb}" in out
