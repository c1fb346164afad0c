"""Verification: what is whole is told so, what is not is named, and the error is measured after rounding."""

from __future__ import annotations

import json

import pytest
import torch

from deltakeeper.compress import compress
from deltakeeper.errors import CheckpointError
from deltakeeper.fingerprint import root_of
from deltakeeper.testing import write_pair
from deltakeeper.verify import verify


@pytest.mark.parametrize(("codec", "exact"), [("bitdelta", True), ("dense", True), ("svd:rank=3", None)])
def test_a_whole_artifact(tmp_path, codec, exact):
    base, tuned = write_pair("qwen2", tmp_path)
    compress(base, tuned, tmp_path / "delta", codec)
    calls = []
    report = verify(tmp_path / "delta", base, tuned, lambda *c: calls.append(c))
    assert report.ok and report.exact is exact and calls
    assert report.to_json()["ok"] is True
    if codec == "dense":
        assert report.total.relative_error == 0 and report.total.cosine == pytest.approx(1)
    else:
        assert 0.1 < report.total.relative_error < 1
        assert 0 < report.tensors["lm_head.weight"].cosine < 1


def test_without_the_fine_tune_nothing_is_measured(tmp_path):
    base, tuned = write_pair("llama", tmp_path)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    report = verify(tmp_path / "delta", base)
    assert report.ok and report.total is None and report.tensors == {}


def test_a_false_promise_and_altered_bytes_are_named(tmp_path):
    base, tuned = write_pair("llama", tmp_path)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    path = tmp_path / "delta" / "delta_config.json"
    manifest = json.loads(path.read_text())
    promised = manifest["reconstruction"]
    promised["leaves"]["lm_head.weight"] = "0" * 64
    promised["root"] = root_of(promised["leaves"])
    path.write_text(json.dumps(manifest))
    payload = tmp_path / "delta" / "delta_model.safetensors"
    raw = bytearray(payload.read_bytes())
    raw[-1] ^= 1
    payload.write_bytes(raw)
    report = verify(tmp_path / "delta", base)
    assert not report.ok and report.exact is False
    assert any("'lm_head.weight' does not decode" in p for p in report.problems)
    assert any("was altered" in p for p in report.problems)


def test_another_fine_tune_is_refused(tmp_path):
    base, tuned = write_pair("llama", tmp_path)
    _, other = write_pair("llama", tmp_path / "other", vocab_extra=3)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    with pytest.raises(CheckpointError, match=r"is not the fine-tune that .* was made from"):
        verify(tmp_path / "delta", base, other)


def test_a_fine_tune_of_the_same_shapes_is_refused_too(tmp_path):
    base, tuned = write_pair("llama", tmp_path)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    with pytest.raises(CheckpointError, match=r"is not the fine-tune that .* was made from"):
        verify(tmp_path / "delta", base, base)


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("bitdelta", {}),
        ("bitdelta:bits=2,scale=column", {"norms": "base"}),
        ("svd:rank=2", {"embeddings": "dense"}),
        ("auto", {"target_ratio": 6}),
        ("auto", {"target_ratio": 2}),
        ("dense", {}),
    ],
)
def test_a_compression_reports_the_error_that_a_verification_finds(tmp_path, codec, options):
    base, tuned = write_pair("llama", tmp_path, dtype=torch.float32, scale=0.02, vocab_extra=3)
    told = compress(base, tuned, tmp_path / "delta", codec, **options).total
    found = verify(tmp_path / "delta", base, tuned).total
    for field in ("relative_error", "cosine", "norm_ratio", "sign_agreement", "zero_fraction"):
        assert getattr(told, field) == pytest.approx(getattr(found, field), abs=2e-4), field
