"""Compression with calibration text, from the files to the artifact."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from deltakeeper import cli, compress, open_artifact, verify
from deltakeeper.apply import apply_delta
from deltakeeper.testing import build_model, write_pair, write_tokenizer

LINES = 60


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    # Few words, so that what layers are fed is far from equal in all directions and calibration has something to use.
    file.write_text("\n\n".join(" ".join(f"w{(3 * i + j * j) % 11}" for j in range(30)) for i in range(LINES)))
    return file


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base, tuned = write_pair("llama", tmp_path_factory.mktemp("models"), dtype=torch.float32, scale=0.02)
    write_tokenizer(tuned)
    return base, tuned


@torch.no_grad()
def divergence(base, tuned, delta, text, folder):
    """Mean squared difference of logits from the fine-tune's, on the words of the text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    apply_delta(base, delta, folder)
    ids = AutoTokenizer.from_pretrained(tuned)(text.read_text(), return_tensors="pt").input_ids[:, :1800].view(-1, 60)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (folder, tuned))
    return float((ours - theirs).square().mean())


@pytest.mark.parametrize("codec", ["deltazip:bits=2", "delta_come:bpw=1.5", "dare:p=0.5,fit_q=bound"])
def test_codecs_that_weigh_errors_do_so(models, text, tmp_path, codec):
    base, tuned = models
    for name, options in (("plain", {}), ("calibrated", {"text": text})):
        compress(base, tuned, tmp_path / name, codec, **options)
    plain, calibrated = (load_file(tmp_path / name / "delta_model.safetensors") for name in ("plain", "calibrated"))
    assert any(a.shape != calibrated[k].shape or not torch.equal(a, calibrated[k]) for k, a in plain.items())
    assert verify(tmp_path / "calibrated", base, tuned).ok
    report = json.loads((tmp_path / "calibrated" / "delta_report.json").read_text())
    assert report["calibration"]["text"] == str(text)
    assert len(report["calibration"]["sha256"]) == 64
    if not codec.startswith("dare"):  # whose bound is on the largest error
        errors = [divergence(base, tuned, tmp_path / n, text, tmp_path / f"{n}-a") for n in ("plain", "calibrated")]
        assert errors[1] < errors[0]


@pytest.mark.parametrize("codec", ["auto", "deltazip", "svd:rank=1"])
def test_a_budget_is_met_with_text_too(models, text, tmp_path, codec):
    base, tuned = models
    compress(base, tuned, tmp_path / "delta", codec, target_size=48_000, text=text)
    assert 0.9 * 48_000 < open_artifact(tmp_path / "delta").nbytes <= 48_000
    assert verify(tmp_path / "delta", base, tuned).ok


def test_an_adapter_is_calibrated_on_the_base_that_was_given(text, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = build_model("llama")
    model.save_pretrained(tmp_path / "base")
    settings = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    for name in ("adapter", "merged"):
        write_tokenizer(tmp_path / name)
        compress(tmp_path / "base", tmp_path / name, tmp_path / f"{name}-delta", "deltazip:bits=2", text=text)
    assert verify(tmp_path / "adapter-delta", tmp_path / "base", tmp_path / "adapter").ok
    errors = [
        open_artifact(tmp_path / f"{name}-delta").manifest.tensors["model.layers.1.mlp.up_proj.weight"].sha256
        for name in ("adapter", "merged")
    ]
    assert errors[0] == errors[1]


def test_a_dry_run_looks_at_the_text(models, text, monkeypatch, capsys):
    def run(*options):
        words = ["compress", *map(str, models), "--target-size", "48000", "--codec", "auto", "--dry-run", "--json"]
        monkeypatch.setattr("sys.argv", ["deltakeeper", *words, *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    plain, weighted = (run(*options) for options in ((), ("--text", str(text))))
    assert plain[0] == weighted[0] == 0
    assert json.loads(plain[1])["groups"] != json.loads(weighted[1])["groups"]
    status, _, err = run("--text", str(text.with_name("none.txt")))
    assert status == 2
    assert "none.txt" in err
