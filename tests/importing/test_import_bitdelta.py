"""BitDelta's own files, written here as its code writes them, against its formula."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deltakeeper.apply import apply_delta
from deltakeeper.artifact import open_artifact
from deltakeeper.errors import CheckpointError
from deltakeeper.importing import import_delta
from deltakeeper.testing import build_model
from deltakeeper.verify import verify

WIDTH = 64


def models(folder, vocab_extra=0):
    """A base and a fine-tune whose layers are as wide as 32 divides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {**sizes, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=96, **config)).bfloat16()
    tuned = LlamaForCausalLM(LlamaConfig(vocab_size=96 + vocab_extra, **config)).bfloat16()
    with torch.no_grad():
        for (_, ours), theirs in zip(tuned.named_parameters(), base.parameters(), strict=True):
            ours[: len(theirs)] = theirs + torch.randn_like(theirs) * 1e-2
    base.save_pretrained(folder / "base")
    return base, tuned


def compressed(base, tuned):
    """The dictionary that BitDelta saves, bit by bit, and the weights that its forward pass uses."""
    held, weights = {}, {}
    before = dict(base.named_parameters())
    for name, parameter in tuned.named_parameters():
        if "proj" not in name:
            held[name] = nn.Parameter(parameter.detach())
            weights[name] = parameter.detach()
            continue
        module = name.removesuffix(".weight")
        delta = parameter.detach() - before[name].detach()
        rows, columns = delta.shape
        mask = torch.zeros(columns // 32, rows, dtype=torch.int64)
        for column in range(columns):
            mask[column // 32] += (delta[:, column] >= 0).long() << (column % 32)
        coeff = delta.float().abs().mean()
        held[f"{module}.mask"] = mask.to(torch.int32)
        held[f"{module}.coeff"] = nn.Parameter(coeff)
        signs = torch.where(delta < 0, -1.0, 1.0)
        weights[name] = (before[name].detach().float() + coeff * signs).bfloat16()
    return held, weights


@pytest.mark.parametrize("vocab_extra", [0, 3])
def test_a_bitdelta_file_decodes_by_its_own_formula(tmp_path, vocab_extra):
    base, tuned = models(tmp_path, vocab_extra)
    held, weights = compressed(base, tuned)
    torch.save(held, tmp_path / "diff.pt")
    report = import_delta(tmp_path / "diff.pt", tmp_path / "base", tmp_path / "delta")
    assert (report.kind, report.changed, report.unchanged) == ("bitdelta", len(weights), 0)
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert set(again) == set(weights)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    found = verify(tmp_path / "delta", tmp_path / "base")
    assert found.ok and found.exact
    assert json.loads((tmp_path / "again" / "config.json").read_text())["vocab_size"] == 96 + vocab_extra
    terms = {t.layout for r in open_artifact(tmp_path / "delta").manifest.tensors.values() for t in r.terms}
    assert terms == {"signs", "dense"}


def test_tensors_that_the_file_does_not_hold_are_the_base_s(tmp_path):
    base, tuned = models(tmp_path)
    held, weights = compressed(base, tuned)
    name = "model.layers.1.mlp.up_proj"
    torch.save({k: v for k, v in held.items() if k.startswith(name)}, tmp_path / "diff.pt")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "tokenizer_config.json").write_text("{}")
    report = import_delta(tmp_path / "diff.pt", tmp_path / "base", tmp_path / "delta", files=tmp_path / "files")
    assert report.changed == 1
    assert (tmp_path / "delta" / "tokenizer_config.json").is_file()
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "again")
    again, before = (load_file(tmp_path / n / "model.safetensors") for n in ("again", "base"))
    assert torch.equal(again[f"{name}.weight"], weights[f"{name}.weight"])
    assert all(torch.equal(again[n], before[n]) for n in before if not n.startswith(name))


MODULE = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{MODULE}.mask": torch.zeros(2, 95, dtype=torch.int32)}, "must be the mask of a matrix"),
        ({f"{MODULE}.mask": torch.zeros(2, 96, dtype=torch.int64)}, "must be the mask of a matrix"),
        ({f"{MODULE}.coeff": torch.ones(2)}, "must be one number"),
        ({f"{MODULE}.coeff": torch.tensor(float("nan"))}, "'model.layers.0.mlp.up_proj.coeff' is not finite"),
        ({f"{MODULE}.coeff": None}, "with its coeff"),
        ({f"{MODULE}.mask": None}, "with its mask"),
        ({"model.norm.weight": torch.ones(65)}, "must be floating-point numbers"),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int8)}, "must be floating-point numbers"),
        ({"model.norm.weight": torch.full((64,), float("inf"))}, "not finite"),
        ({"lm_head.weight": torch.ones(1, 64).expand(1 << 30, 64)}, "must be floating-point numbers"),
        ({"model.other.weight": torch.ones(64)}, "which .* does not have"),
        ({"model.norm.weight": torch.ones(64).to_sparse()}, "no plain tensor"),
        ({"model.norm.weight": "text"}, "no plain tensor"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path, change, said):
    base, tuned = models(tmp_path)
    held, _ = compressed(base, tuned)
    torch.save({k: v for k, v in (held | change).items() if v is not None}, tmp_path / "diff.pt")
    with pytest.raises(CheckpointError, match=said):
        import_delta(tmp_path / "diff.pt", tmp_path / "base", tmp_path / "delta")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "diff.pt"]


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("code of the file was run",))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: torch.save({"a": Trap()}, path), "without running code"),
        (lambda path: path.write_bytes(pickle.dumps({"a": Trap()})), r"without running code \(\w+\); give"),
        (lambda path: path.write_bytes(b"junk"), "without running code"),
        (lambda path: torch.save([torch.ones(1)], path), "no dictionary of tensors"),
        (lambda path: torch.save({}, path), "no dictionary of tensors"),
    ],
)
def test_no_code_in_a_file_is_run(tmp_path, write, said):
    build_model("llama").save_pretrained(tmp_path / "base")
    write(tmp_path / "diff.pt")
    with pytest.raises(CheckpointError, match=said) as error:
        import_delta(tmp_path / "diff.pt", tmp_path / "base", tmp_path / "delta")
    assert "\n" not in str(error.value)
