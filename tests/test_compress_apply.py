"""Compress and apply, end to end, on tiny models of many architectures."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from deltakeeper.apply import apply_delta, iterate_changes, iterate_merged, merge_survival
from deltakeeper.artifact import open_artifact
from deltakeeper.attach import attached
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.codecs import parse_codec
from deltakeeper.compress import CompressionReport, compress
from deltakeeper.delta import pair
from deltakeeper.errors import BaseMismatchError, CheckpointError, CodecError, DeltakeeperError, RunError
from deltakeeper.plan import TINY
from deltakeeper.testing import KINDS, build_model, write_pair

CODECS = ("bitdelta:bits=2", "svd:rank=4", "magnitude:keep=0.2", "dare:p=0.5", "bitdelta:scale=row+svd:rank=2")
IDS = torch.tensor([[1, 5, 9, 13, 21]])


def read_all(path):
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def by_hand(base, tuned, codec):
    """The reconstruction, straight from the codec: no plan, no artifact, no layouts on disk."""
    method = parse_codec(codec)
    with open_checkpoint(base) as origin, open_checkpoint(tuned) as target:
        models = pair(origin, target)
        result = {}
        for delta in models:
            value = delta.tuned
            encoded = delta.base is not None and value.ndim >= 2 and value.numel() >= TINY
            if encoded and not torch.equal(delta.base, value):
                matrix = delta.matrix()
                parts = [matrix] if matrix.ndim == 2 else list(matrix)
                names = [delta.name] if matrix.ndim == 2 else [f"{delta.name}[{i}]" for i in range(len(parts))]
                dense = [
                    sum((t.to_dense() for t in method.encode(p, name=n)), torch.zeros_like(p))
                    for p, n in zip(parts, names, strict=True)
                ]
                total = dense[0] if matrix.ndim == 2 else torch.stack(dense)
                total = total.T if delta.transposed else total
                shared = (delta.base.float()[: len(total)] + total).to(value.dtype)
                value = torch.cat([shared, delta.tuned[len(shared) :]])
            result[delta.name] = value
        return result


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", KINDS)
def test_apply_equals_the_reconstruction_in_memory(tmp_path, kind, codec):
    base, tuned = write_pair(kind, tmp_path)
    compress(base, tuned, tmp_path / "delta", codec)
    apply_delta(base, tmp_path / "delta", tmp_path / "again")
    expected, got = by_hand(base, tuned, codec), read_all(tmp_path / "again")
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_dense_gives_the_fine_tune_back_and_transformers_loads_it(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    base, tuned = write_pair(kind, tmp_path)
    compress(base, tuned, tmp_path / "delta", "dense")
    apply_delta(base, tmp_path / "delta", tmp_path / "again")
    expected, got = read_all(tuned), read_all(tmp_path / "again")
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    again, true = (AutoModelForCausalLM.from_pretrained(p).eval() for p in (tmp_path / "again", tuned))
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, true(IDS).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe", "gpt2"])
def test_a_compressed_model_loads_and_runs(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    base, tuned = write_pair(kind, tmp_path, scale=0.05)
    compress(base, tuned, tmp_path / "delta", "bitdelta:bits=8")
    apply_delta(base, tmp_path / "delta", tmp_path / "again")
    models = [
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (base, tuned, tmp_path / "again")
    ]
    with torch.inference_mode():
        before, true, again = (m(IDS).logits for m in models)
    assert (again - true).norm() < 0.5 * (before - true).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_and_any_sharding(tmp_path, dtype):
    base, tuned = write_pair("llama", tmp_path, dtype=dtype, max_shard_size="40KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    whole, _ = write_pair("llama", tmp_path / "whole", dtype=dtype)
    first = compress(base, tuned, tmp_path / "delta", "bitdelta")
    second = compress(whole, tuned, tmp_path / "delta2", "bitdelta")
    assert first.total == second.total
    payloads = [(tmp_path / d / "delta_model.safetensors").read_bytes() for d in ("delta", "delta2")]
    assert payloads[0] == payloads[1]
    apply_delta(whole, tmp_path / "delta", tmp_path / "again")
    assert read_all(tmp_path / "again")["lm_head.weight"].dtype == dtype


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gemma3"])
def test_a_grown_vocabulary_keeps_its_new_rows(tmp_path, kind):
    base, tuned = write_pair(kind, tmp_path, vocab_extra=5)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    artifact = open_artifact(tmp_path / "delta")
    grown = [n for n in artifact.names if artifact.record(n).added_rows]
    assert grown and all(artifact.record(n).added_rows == 5 for n in grown)
    apply_delta(base, artifact, tmp_path / "again")
    expected, got = read_all(tuned), read_all(tmp_path / "again")
    for name in grown:
        assert torch.equal(got[name][-5:], expected[name][-5:])
    assert json.loads((tmp_path / "again" / "config.json").read_text())["vocab_size"] == len(expected[grown[0]])


def test_a_shrunk_vocabulary_is_encoded_over_its_rows(tmp_path):
    tuned, base = write_pair("llama", tmp_path, vocab_extra=3)
    compress(base, tuned, tmp_path / "delta", "dense")
    apply_delta(base, tmp_path / "delta", tmp_path / "again")
    expected, got = read_all(tuned), read_all(tmp_path / "again")
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    compress(base, tuned, tmp_path / "delta1", "bitdelta:bits=8")
    apply_delta(base, tmp_path / "delta1", tmp_path / "again1")
    near = read_all(tmp_path / "again1")["lm_head.weight"].float()
    assert near.shape == expected["lm_head.weight"].shape
    assert (near - expected["lm_head.weight"].float()).norm() < 0.05 * near.norm()


def test_everything_is_recorded_and_unchanged_tensors_cost_nothing(tmp_path):
    base, tuned = write_pair("qwen2", tmp_path)
    report = compress(base, tuned, tmp_path / "delta", "bitdelta")
    artifact = open_artifact(tmp_path / "delta")
    with open_checkpoint(tuned) as checkpoint:
        assert artifact.names == list(checkpoint.tensors)
    kept = artifact.record("model.layers.0.self_attn.o_proj.weight")
    assert kept.encoding == "unchanged" and kept.stored_bytes == 0
    bias = artifact.record("model.layers.1.self_attn.q_proj.bias")
    assert bias.role == "bias" and bias.terms[0].settings["encoding"] == "value"
    on_disk = sum(f.stat().st_size for f in (tmp_path / "delta").iterdir())
    assert report.nbytes + artifact.side_bytes == on_disk
    assert report.bits_per_weight == pytest.approx(8 * report.nbytes / artifact.weights)


def test_the_report_is_kept_and_read_again(tmp_path):
    base, tuned = write_pair("llama", tmp_path)
    calls = []
    report = compress(base, tuned, tmp_path / "delta", "bitdelta", progress=lambda *c: calls.append(c))
    assert CompressionReport.load(tmp_path / "delta") == report
    assert [c[0] for c in calls] == list(range(len(report.tensors)))
    assert report.to_json()["ratio"] == pytest.approx(report.full_bytes / report.nbytes)
    (tmp_path / "delta" / "delta_report.json").write_text("{}")
    with pytest.raises(RunError, match="compress again"):
        CompressionReport.load(tmp_path / "delta")


@pytest.mark.parametrize("kind", ["llama_tied", "gpt2", "gemma3"])
def test_attached_changes_equal_the_merged_model(tmp_path, kind):
    base, tuned = write_pair(kind, tmp_path, dtype=torch.float32, scale=0.02)
    compress(base, tuned, tmp_path / "delta", "bitdelta:bits=3")
    artifact = open_artifact(tmp_path / "delta")
    live, merged = build_model(kind), build_model(kind)
    with open_checkpoint(base) as origin, torch.inference_mode():
        merged.load_state_dict(dict(iterate_merged(origin, artifact)), strict=False)
        before = live(IDS).logits
        with attached(live, iterate_changes(origin, artifact)):
            assert torch.allclose(live(IDS).logits, merged(IDS).logits, atol=2e-4)
        assert torch.equal(live(IDS).logits, before)
        assert not torch.allclose(before, merged(IDS).logits, atol=1e-3)


def test_merge_survival_falls_with_the_size_of_the_delta(tmp_path):
    shares = []
    for scale in (1e-6, 1e-4, 1e-1):
        base, tuned = write_pair("llama", tmp_path / str(scale), dtype=torch.float32, scale=scale)
        folder = tmp_path / str(scale) / "delta"
        compress(base, tuned, folder, "bitdelta")
        edited = json.loads((folder / "delta_config.json").read_text())
        for record in edited["tensors"].values():
            record["dtype"] = "BF16" if record["terms"] and record["terms"][0]["layout"] == "signs" else record["dtype"]
        (folder / "delta_config.json").write_text(json.dumps(edited))
        with open_checkpoint(base) as origin:
            shares.append(merge_survival(origin, open_artifact(folder)))
    assert shares == sorted(shares)
    assert shares[0] < 0.2 and shares[-1] > 0.95


def test_another_base_is_refused_by_the_name_of_the_tensor(tmp_path):
    base, tuned = write_pair("llama", tmp_path)
    other, _ = write_pair("llama", tmp_path / "other", seed=7)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    with pytest.raises(BaseMismatchError, match=r"lm_head\.weight"):
        apply_delta(other, tmp_path / "delta", tmp_path / "again")
    smaller, _ = write_pair("gpt2", tmp_path / "smaller")
    with pytest.raises(BaseMismatchError, match="has no tensor"):
        apply_delta(smaller, tmp_path / "delta", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert not list(tmp_path.glob(".*"))


def test_models_that_do_not_belong_together_are_refused(tmp_path):
    base, _ = write_pair("llama", tmp_path / "a")
    _, tuned = write_pair("gpt2", tmp_path / "b")
    with pytest.raises(CheckpointError, match="no matrix in common"):
        compress(base, tuned, tmp_path / "delta", "bitdelta")
    assert not (tmp_path / "delta").exists()


def test_broken_fine_tunes_are_refused_and_leave_nothing(tmp_path):
    from safetensors.torch import save_file

    base, tuned = write_pair("llama", tmp_path)
    tensors = read_all(tuned)
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].clone()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CodecError, match=r"layers\.1\.mlp\.up_proj.* holds NaN or infinity in 1 entries"):
        compress(base, tuned, tmp_path / "delta", "bitdelta")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    base, tuned = write_pair("llama", tmp_path)
    compress(base, tuned, tmp_path / "delta", "dense")
    monkeypatch.setattr("deltakeeper.model_writer.SHARD_BYTES", 30_000)
    apply_delta(base, tmp_path / "delta", tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    expected = read_all(tuned)
    assert all(torch.equal(t, expected[n]) for n, t in read_all(tmp_path / "again").items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def test_outputs_are_not_replaced_unless_asked_and_never_if_they_are_something_else(tmp_path):
    base, tuned = write_pair("llama", tmp_path)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    with pytest.raises(DeltakeeperError, match="exists"):
        compress(base, tuned, tmp_path / "delta", "dense")
    assert open_artifact(tmp_path / "delta").manifest.codec == "bitdelta"
    compress(base, tuned, tmp_path / "delta", "dense", overwrite=True)
    assert open_artifact(tmp_path / "delta").manifest.codec == "dense"
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("keep me")
    with pytest.raises(DeltakeeperError, match="neither an artifact nor a model"):
        apply_delta(base, tmp_path / "delta", tmp_path / "letters", overwrite=True)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "keep me"


def test_an_interrupted_compression_leaves_nothing(tmp_path):
    base, tuned = write_pair("llama", tmp_path)

    def interrupt(done, _total, _name):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(base, tuned, tmp_path / "delta", "bitdelta", progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "tuned"]


def test_written_files_are_plain_safetensors(tmp_path):
    base, tuned = write_pair("llama", tmp_path)
    compress(base, tuned, tmp_path / "delta", "bitdelta:scale=row,zero=plus")
    with safe_open(tmp_path / "delta" / "delta_model.safetensors", framework="pt") as file:
        keys = list(file.keys())
        packed = file.get_tensor("lm_head.weight::0.delta_packed.0")
    assert all("::" in key for key in keys)
    assert packed.dtype == torch.int32 and packed.shape == (96, 2)


def test_no_model_and_no_input_is_ever_replaced_by_mistake(tmp_path):
    base, tuned = write_pair("llama", tmp_path)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    whole = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for out in (base, tuned):
        with pytest.raises(DeltakeeperError, match="another kind"):
            compress(base, tuned, out, "bitdelta", overwrite=True)
    with pytest.raises(DeltakeeperError, match="is made from"):
        apply_delta(base, tmp_path / "delta", base, overwrite=True)
    with pytest.raises(DeltakeeperError, match="another kind"):
        apply_delta(base, tmp_path / "delta", tmp_path / "delta", overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == whole
