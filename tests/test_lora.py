"""PEFT adapters as fine-tunes, against what peft itself merges."""

from __future__ import annotations

import json

import pytest
import torch

from deltakeeper.apply import apply_delta
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.errors import CheckpointError
from deltakeeper.testing import build_model


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
                "lora_alpha": 8,
                "target_modules": ["q_proj", "v_proj"],
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"v_proj": 5},
            },
        ),
        ("llama", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"r": 2, "target_modules": ["embed_tokens"]}),
        ("qwen2", {"r": 2, "target_modules": ["q_proj"], "bias": "all"}),
        ("gpt2", {"r": 3, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_the_fine_tune_is_what_peft_merges(tmp_path, kind, settings):
    base, adapter, merged = write_adapter(tmp_path, kind, **settings)
    with open_checkpoint(base) as origin, open_checkpoint(adapter, base=origin) as tuned:
        assert tuned.tensors == origin.tensors
        changed = 0
        for name in tuned.tensors:
            assert torch.allclose(tuned.read(name), merged[name], atol=1e-6), name
            changed += not torch.equal(tuned.read(name), origin.read(name))
        assert changed


def test_an_adapter_is_compressed_without_loss_by_its_own_rank(tmp_path):
    base, adapter, merged = write_adapter(
        tmp_path, r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], dtype=torch.bfloat16
    )
    report = compress(base, adapter, tmp_path / "delta", "svd:rank=4,factors=float32")
    assert report.total.relative_error < 1e-4
    apply_delta(base, tmp_path / "delta", tmp_path / "again")
    with open_checkpoint(tmp_path / "again") as again:
        for name in again.tensors:
            assert again.read(name).dtype == torch.bfloat16
            assert torch.allclose(again.read(name).float(), merged[name].float(), atol=2e-2)


def test_the_bytes_of_an_adapted_tensor_are_the_merged_ones(tmp_path):
    base, adapter, _ = write_adapter(tmp_path, r=4, target_modules=["q_proj"], dtype=torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj.weight"
    with open_checkpoint(base) as origin, open_checkpoint(adapter, base=origin) as tuned:
        assert tuned.read(name).dtype == torch.float32
        rounded = tuned.read(name).bfloat16().view(torch.uint8).numpy().tobytes()
        assert bytes(tuned.raw(name)) == rounded
        assert bytes(tuned.raw("lm_head.weight")) == bytes(origin.raw("lm_head.weight"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"use_dora": True}, "'use_dora'"),
        ({"r": 0}, "rank of 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank of 0"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
        ({"lora_alpha": "x"}, "alpha of 'x'"),
        ({"lora_alpha": float("nan")}, "alpha of nan"),
        ({"use_rslora": "False"}, "true or false"),
        ({"init_lora_weights": "pissa_niter_4"}, "may alter the base"),
        ({"alora_invocation_tokens": [1]}, "'alora_invocation_tokens'"),
        ({"target_parameters": ["experts"]}, "'target_parameters'"),
    ],
)
def test_other_adapters_are_refused(tmp_path, change, said):
    base, adapter, _ = write_adapter(tmp_path, r=4, target_modules=["q_proj"])
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with open_checkpoint(base) as origin, pytest.raises(CheckpointError, match=said):
        open_checkpoint(adapter, base=origin)


def test_an_adapter_that_grows_the_vocabulary_is_refused(tmp_path):
    _, adapter, _ = write_adapter(tmp_path, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    build_model("llama", vocab_extra=4).save_pretrained(tmp_path / "larger")
    with open_checkpoint(tmp_path / "larger") as base, pytest.raises(CheckpointError, match="shape of 'lm_head"):
        open_checkpoint(adapter, base=base)


def test_an_adapter_needs_its_base(tmp_path):
    base, adapter, _ = write_adapter(tmp_path, r=4, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="give the model it was trained on"):
        open_checkpoint(adapter)
    build_model("gpt2").save_pretrained(tmp_path / "other")
    with open_checkpoint(tmp_path / "other") as other, pytest.raises(CheckpointError, match="has no tensor"):
        open_checkpoint(adapter, base=other)
    (adapter / "adapter_model.safetensors").unlink()
    with open_checkpoint(base) as origin, pytest.raises(CheckpointError, match="save the adapter as safetensors"):
        open_checkpoint(adapter, base=origin)


@pytest.mark.parametrize("shape", [(48,), (48, 5), (3, 48, 4)])
def test_factors_of_another_rank_than_the_settings_say_are_refused(tmp_path, shape):
    from safetensors.torch import load_file, save_file

    base, adapter, _ = write_adapter(tmp_path, r=4, target_modules=["q_proj"])
    name, file = "model.layers.0.self_attn.q_proj", adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{name}.lora_B.weight": torch.zeros(shape)}, file)
    with (
        open_checkpoint(base) as origin,
        open_checkpoint(adapter, base=origin) as tuned,
        pytest.raises(CheckpointError, match="rank 4"),
    ):
        tuned.read(f"{name}.weight")
