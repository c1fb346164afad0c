"""LoRA adapters from artifacts: peft loads them and computes what the applied model computes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltakeeper.apply import apply_delta, iterate_merged
from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.errors import ArtifactError, BaseMismatchError
from deltakeeper.export import export_lora
from deltakeeper.export.modules import linear_modules, module_of
from deltakeeper.importing import import_delta
from deltakeeper.testing import write_pair

IDS = torch.tensor([[1, 5, 9, 13, 21, 34, 55]])
REST = ("embed_", "lm_head", "norm", "wte", "wpe", "ln_", "bias")


def linear_pair(folder, kind="llama", keep=()):
    """A float32 pair that differs in linear layers only, and in what `keep` names."""
    base, tuned = write_pair(kind, folder, dtype=torch.float32, scale=2e-2)
    before, after = (load_file(path / "model.safetensors") for path in (base, tuned))
    for name in after:
        if any(part in name for part in REST) and not any(part in name for part in keep):
            after[name] = before[name]
    save_file(after, tuned / "model.safetensors", metadata={"format": "pt"})
    return base, tuned


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def adapted(base, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(load(base), adapter).eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_peft_computes_what_the_applied_model_computes(tmp_path, kind, uniform):
    base, tuned = linear_pair(tmp_path, kind)
    compress(base, tuned, tmp_path / "delta", "svd:energy=0.6,factors=float32")
    found = export_lora(tmp_path / "delta", base, tmp_path / "adapter", uniform_rank=uniform)
    assert len({m.rank for m in found.modules.values()}) > 1 and found.relative_error < 1e-6 and not found.dropped
    assert all(module.exact for module in found.modules.values())
    apply_delta(base, tmp_path / "delta", tmp_path / "again")
    goal, before = logits(load(tmp_path / "again")), logits(load(base))
    ours = logits(adapted(base, tmp_path / "adapter"))
    assert torch.allclose(ours, goal, atol=1e-5)
    assert not torch.allclose(before, goal, atol=1e-3)


def test_the_files_are_what_vllm_reads(tmp_path):
    base, tuned = linear_pair(tmp_path)
    compress(base, tuned, tmp_path / "delta", "svd:rank=5")
    found = export_lora(tmp_path / "delta", base, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    module = "model.layers.1.mlp.down_proj"
    assert tensors[f"base_model.model.{module}.lora_A.weight"].shape == (5, 80)
    assert tensors[f"base_model.model.{module}.lora_B.weight"].shape == (48, 5)
    assert len(tensors) == 2 * len(found.modules) == 2 * len(config["target_modules"])
    assert config["r"] == config["lora_alpha"] == 5 and config["rank_pattern"] == {}
    assert (config["bias"], config["modules_to_save"], config["use_dora"]) == ("none", None, False)
    assert (found.rank, found.vllm_rank) == (5, 8)
    assert config["base_model_name_or_path"] == str(base)


def test_padding_keeps_every_module_at_one_rank_and_the_patterns_empty(tmp_path):
    base, tuned = linear_pair(tmp_path)
    compress(base, tuned, tmp_path / "delta", "svd:energy=0.6")
    padded = export_lora(tmp_path / "delta", base, tmp_path / "padded", uniform_rank=True)
    export_lora(tmp_path / "delta", base, tmp_path / "plain")
    ours, plain = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("padded", "plain"))
    assert {t.shape[0] for k, t in ours.items() if "lora_A" in k} == {padded.rank}
    assert {t.shape[1] for k, t in ours.items() if "lora_B" in k} == {padded.rank}
    for key in (k for k in ours if "lora_A" in k):
        other = key.replace("lora_A", "lora_B")
        assert torch.equal(ours[other] @ ours[key], plain[other] @ plain[key])
    config = json.loads((tmp_path / "padded" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


@pytest.mark.parametrize("codec", ["bitdelta", "svd:rank=9,factors=float32", "bitdelta+svd:rank=2", "dense"])
def test_any_delta_is_approximated_as_well_as_its_rank_allows(tmp_path, codec):
    base, tuned = linear_pair(tmp_path)
    compress(base, tuned, tmp_path / "delta", codec)
    found = export_lora(tmp_path / "delta", base, tmp_path / "adapter", rank=6)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    total, missed = 0.0, 0.0
    with open_checkpoint(base) as origin:
        for name, merged in iterate_merged(origin, open_artifact(tmp_path / "delta")):
            delta = (merged - origin.read(name)).double()
            module = name.removesuffix(".weight")
            if module not in found.modules:
                assert delta.norm() == 0
                continue
            values = torch.linalg.svdvals(delta)
            best = float(values[6:].norm() / values.norm())
            own = (
                tensors[f"base_model.model.{module}.lora_B.weight"]
                @ tensors[f"base_model.model.{module}.lora_A.weight"]
            )
            error = float((own - delta).norm() / delta.norm())
            assert found.modules[module].relative_error == pytest.approx(error, abs=1e-4)
            assert best * 0.999 <= error <= best * 1.01 + 1e-5
            total, missed = total + float(delta.norm()) ** 2, missed + float((own - delta).norm()) ** 2
    assert found.relative_error == pytest.approx((missed / total) ** 0.5, abs=1e-4)
    assert not any(module.exact for module in found.modules.values())


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_factors_of_half_precision_keep_small_deltas(tmp_path, dtype, bound):
    base, tuned = linear_pair(tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (base, tuned))
    small = {n: before[n] * 1e-5 + (after[n] - before[n]) * 1e-6 for n in before}
    save_file({n: t * 1e-5 for n, t in before.items()}, base / "model.safetensors", metadata={"format": "pt"})
    save_file(small, tuned / "model.safetensors", metadata={"format": "pt"})
    compress(base, tuned, tmp_path / "delta", "svd:rank=4")
    found = export_lora(tmp_path / "delta", base, tmp_path / "adapter", dtype=dtype)
    assert 0 < found.relative_error < bound
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{dtype}"}


def test_nothing_is_left_out_unasked(tmp_path):
    base, tuned = linear_pair(tmp_path, keep=("embed_tokens", "lm_head", "input_layernorm"))
    compress(base, tuned, tmp_path / "delta", "svd:rank=4")
    with pytest.raises(ArtifactError, match=r"cannot hold 4 .*'lm_head\.weight' \(an output head\).*--drop-rest"):
        export_lora(tmp_path / "delta", base, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    found = export_lora(tmp_path / "delta", base, tmp_path / "adapter", drop_rest=True)
    assert found.dropped == {
        "lm_head.weight": "an output head",
        "model.embed_tokens.weight": "an embedding",
        "model.layers.0.input_layernorm.weight": "a norm",
        "model.layers.1.input_layernorm.weight": "a norm",
    }
    assert json.dumps(found.to_json())
    adapted(base, tmp_path / "adapter")


def test_experts_biases_and_grown_vocabularies_are_named(tmp_path):
    base, tuned = write_pair("mixtral", tmp_path / "moe", dtype=torch.float32)
    compress(base, tuned, tmp_path / "moe" / "delta", "svd:rank=2")
    found = export_lora(tmp_path / "moe" / "delta", base, tmp_path / "moe" / "adapter", drop_rest=True)
    reasons = {reason for name, reason in found.dropped.items() if "experts" in name}
    assert reasons == {"no linear layer of the model that transformers builds"}
    assert all("self_attn" in module for module in found.modules)
    base, tuned = write_pair("qwen2", tmp_path / "bias", dtype=torch.float32, vocab_extra=2)
    compress(base, tuned, tmp_path / "bias" / "delta", "svd:rank=2")
    found = export_lora(tmp_path / "bias" / "delta", base, tmp_path / "bias" / "adapter", drop_rest=True)
    assert found.dropped["model.layers.0.self_attn.q_proj.bias"] == "a bias"
    assert found.dropped["lm_head.weight"] == "an output head"


def test_an_imported_adapter_goes_out_as_it_came_in(tmp_path):
    base, tuned = linear_pair(tmp_path)
    compress(base, tuned, tmp_path / "delta", "svd:energy=0.7,factors=float32")
    export_lora(tmp_path / "delta", base, tmp_path / "first")
    import_delta(tmp_path / "first", base, tmp_path / "imported")
    export_lora(tmp_path / "imported", base, tmp_path / "second")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_errors_say_what_to_do(tmp_path):
    base, tuned = linear_pair(tmp_path)
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    with pytest.raises(ArtifactError, match=r"not low-rank, such as .*give --rank"):
        export_lora(tmp_path / "delta", base, tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="rank of 0"):
        export_lora(tmp_path / "delta", base, tmp_path / "adapter", rank=0)
    with pytest.raises(ArtifactError, match="choose one of float16"):
        export_lora(tmp_path / "delta", base, tmp_path / "adapter", rank=2, dtype="int8")
    with pytest.raises(ArtifactError, match="exists; give another folder"):
        export_lora(tmp_path / "delta", base, tuned, rank=2)
    with pytest.raises(BaseMismatchError):
        export_lora(tmp_path / "delta", tuned, tmp_path / "adapter", rank=2)
    shutil.copytree(base, tmp_path / "normed")
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, tmp_path / "normed/model.safetensors")
    compress(base, tmp_path / "normed", tmp_path / "nothing", "bitdelta")
    with pytest.raises(ArtifactError, match="changes no linear layer"):
        export_lora(tmp_path / "nothing", base, tmp_path / "adapter", drop_rest=True)
    assert not (tmp_path / "adapter").exists()


def test_modules_are_those_of_transformers_where_it_knows_the_architecture(tmp_path):
    base, _ = write_pair("gpt2", tmp_path)
    with open_checkpoint(base) as origin:
        modules = linear_modules(origin)
    assert module_of("h.0.attn.c_attn.weight", modules) == "transformer.h.0.attn.c_attn"
    assert module_of("h.0.attn.c_attn.bias", modules) is None
    assert module_of("transformer.wte.weight", modules) is None
    (base / "config.json").write_text('{"model_type": "unheard-of"}')
    with open_checkpoint(base) as origin:
        assert linear_modules(origin) is None
    assert module_of("h.0.attn.c_attn.weight", None) == "h.0.attn.c_attn"
