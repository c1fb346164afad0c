"""PEFT adapters as artifacts, against what peft itself merges."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltakeeper.apply import apply_delta, iterate_changes
from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.errors import ArtifactError, CheckpointError
from deltakeeper.importing import import_delta
from deltakeeper.testing import build_model
from deltakeeper.verify import verify


def write_adapter(folder, kind="llama", dtype=torch.float32, **settings):
    from peft import LoraConfig, get_peft_model

    model = build_model(kind).to(dtype)
    model.save_pretrained(folder / "base")
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name or (name.endswith("bias") and settings.get("bias")):
                parameter.add_(0.1)
    adapted.save_pretrained(folder / "adapter")
    merged = adapted.merge_and_unload()
    return folder / "base", folder / "adapter", {n: p.detach() for n, p in merged.named_parameters()}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"}),
        (
            "llama",
            {
                "r": 4,
                "target_modules": ["q_proj", "v_proj"],
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"v_proj": 5},
            },
        ),
        ("llama", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"r": 2, "target_modules": ["embed_tokens"]}),
        ("llama", {"r": 60, "target_modules": ["v_proj", "down_proj"]}),
        ("qwen2", {"r": 2, "target_modules": ["q_proj"], "bias": "all"}),
        ("gpt2", {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_an_adapter_decodes_to_what_peft_merges(tmp_path, kind, settings):
    base, adapter, merged = write_adapter(tmp_path, kind, **settings)
    report = import_delta(adapter, base, tmp_path / "delta")
    assert report.kind == "peft" and report.changed and report.unchanged and report.nbytes < report.full_bytes
    apply_delta(base, tmp_path / "delta", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.allclose(again[name], merged[name], atol=1e-6) for name in again)
    assert verify(tmp_path / "delta", base).ok


def test_factors_are_kept_to_the_bit_and_the_scaling_is_their_gain(tmp_path):
    base, adapter, _ = write_adapter(tmp_path, r=4, lora_alpha=10, target_modules=["q_proj"], dtype=torch.bfloat16)
    file = adapter / "adapter_model.safetensors"
    stored = {key: tensor.bfloat16() for key, tensor in load_file(file).items()}
    save_file(stored, file)
    import_delta(adapter, base, tmp_path / "delta")
    name = "model.layers.1.self_attn.q_proj"
    [term] = open_artifact(tmp_path / "delta").terms(f"{name}.weight")
    held = term.tensors()
    assert torch.equal(held["delta_U"], stored[f"base_model.model.{name}.lora_B.weight"])
    assert torch.equal(held["delta_V"], stored[f"base_model.model.{name}.lora_A.weight"])
    assert held["delta_gain"].item() == 2.5 and term.settings()["factors"] == "bfloat16"


def test_only_what_the_adapter_changes_is_stored_and_the_card_tells_where_from(tmp_path):
    base, adapter, _ = write_adapter(tmp_path, r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    tensors[key].zero_()  # as for a module that was not trained
    with open_checkpoint(base) as origin:
        [head] = [k for k in tensors if "lm_head" in k]
        tensors[head] = origin.read("lm_head.weight")
    save_file(tensors, file)
    (adapter / "tokenizer_config.json").write_text("{}")
    import_delta(adapter, base, tmp_path / "delta")
    artifact = open_artifact(tmp_path / "delta")
    changed = [n for n in artifact.names if artifact.record(n).encoding == "terms"]
    assert changed == ["model.layers.1.self_attn.q_proj.weight"]
    with open_checkpoint(base) as origin:
        assert [c.name for c in iterate_changes(origin, artifact)] == changed
    assert (tmp_path / "delta" / "tokenizer_config.json").is_file()
    card = (tmp_path / "delta" / "README.md").read_text()
    assert "imported from PEFT" in card and f"deltakeeper import {adapter} --base {base}" in card


def test_what_is_no_adapter_is_refused_and_leaves_nothing(tmp_path):
    base, adapter, _ = write_adapter(tmp_path, r=4, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="deltakeeper compress"):
        import_delta(base, base, tmp_path / "delta")
    with pytest.raises(ArtifactError, match="exists"):
        import_delta(adapter, base, adapter)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="not finite"):
        import_delta(adapter, base, tmp_path / "delta")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(CheckpointError, match="use_dora"):
        import_delta(adapter, base, tmp_path / "delta")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
