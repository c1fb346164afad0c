"""Pairing base and fine-tune: roles, ties, new and missing tensors, prefixes, Conv1D."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.delta import pair, role_of
from deltakeeper.errors import CheckpointError
from deltakeeper.plan import treat
from deltakeeper.testing import write_pair


def write(folder, tensors, **config):
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def models(base, tuned):
    return pair(open_checkpoint(base), open_checkpoint(tuned))


@pytest.mark.filterwarnings("ignore:.*unclosed file:ResourceWarning")
class TestPairs:
    def test_the_matrix_is_the_difference_in_float32(self, tmp_path):
        base, tuned = write_pair("gpt2", tmp_path)
        found = models(base, tuned)
        name = "transformer.h.1.attn.c_attn.weight"
        delta = found.tensor(name)
        assert delta.transposed and delta.role == "linear"
        assert torch.equal(delta.matrix(), (delta.tuned.float() - delta.base.float()).T)
        before = delta.tuned.clone()
        delta.matrix().zero_()
        assert torch.equal(delta.tuned, before)

    def test_float32_sources_are_never_written_to(self, tmp_path):
        base, tuned = write_pair("llama", tmp_path, dtype=torch.float32)
        delta = models(base, tuned).tensor("lm_head.weight")
        before = delta.tuned.clone()
        delta.matrix()
        assert torch.equal(delta.tuned, before)

    def test_roles_and_treatments_cover_every_tensor(self, tmp_path):
        base, tuned = write_pair("qwen2", tmp_path)
        found = models(base, tuned)
        seen = {name: (found.role(name), treat(found, found.tensor(name))) for name in found.names()}
        assert seen["model.embed_tokens.weight"] == ("embedding", "terms")
        assert seen["lm_head.weight"] == ("head", "terms")
        assert seen["model.norm.weight"] == ("norm", "value")
        assert seen["model.layers.0.self_attn.q_proj.bias"] == ("bias", "value")
        assert seen["model.layers.0.self_attn.o_proj.weight"] == ("linear", "unchanged")
        assert seen["model.layers.1.mlp.up_proj.weight"] == ("linear", "terms")

    def test_a_tied_head_is_an_alias_only_if_its_bytes_are_equal(self, tmp_path):
        embedding, other = torch.randn(40, 32), torch.randn(40, 32)
        base = write(tmp_path / "base", {"model.embed_tokens.weight": embedding})
        same = {"model.embed_tokens.weight": embedding + 1, "lm_head.weight": embedding + 1}
        tied = models(base, write(tmp_path / "tied", same))
        assert tied.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        untied = models(base, write(tmp_path / "untied", same | {"lm_head.weight": other}))
        assert untied.tied == {}
        assert treat(untied, untied.tensor("lm_head.weight")) == "value"

    def test_new_and_missing_tensors_are_told(self, tmp_path):
        shared = {"w.weight": torch.randn(40, 32)}
        base = write(tmp_path / "base", shared | {"old.weight": torch.ones(3, 3)})
        found = models(
            base, write(tmp_path / "tuned", {"w.weight": torch.randn(40, 32), "new.weight": torch.ones(2, 2)})
        )
        assert found.missing == ["old.weight"]
        assert found.tensor("new.weight").base is None
        assert found.tensor("new.weight").added_rows() is None
        with pytest.raises(ValueError, match="has no base"):
            found.tensor("new.weight").matrix()

    def test_masks_of_truth_values_are_stored_as_they_are(self, tmp_path):
        matrix = torch.randn(40, 32)
        base = write(tmp_path / "base", {"w": matrix, "mask": torch.zeros(40, 32, dtype=torch.bool)})
        tuned = write(tmp_path / "tuned", {"w": matrix, "mask": torch.ones(40, 32, dtype=torch.bool)})
        found = models(base, tuned)
        assert treat(found, found.tensor("mask")) == "value"

    def test_a_prefix_on_one_side_is_seen_through(self, tmp_path):
        base = write(tmp_path / "base", {"h.0.w.weight": torch.randn(40, 32)})
        tuned = write(tmp_path / "tuned", {"transformer.h.0.w.weight": torch.randn(40, 32)})
        assert models(base, tuned).base_name("transformer.h.0.w.weight") == "h.0.w.weight"
        assert models(tuned, base).base_name("h.0.w.weight") == "transformer.h.0.w.weight"

    def test_a_prefix_is_seen_through_where_a_head_has_none(self, tmp_path):
        head, matrix = torch.randn(40, 32), torch.randn(40, 32)
        base = write(tmp_path / "base", {"h.0.w.weight": matrix, "lm_head.weight": head})
        tuned = write(tmp_path / "tuned", {"transformer.h.0.w.weight": matrix + 1, "lm_head.weight": head + 1})
        for found in (models(base, tuned), models(tuned, base)):
            assert found.missing == []
            assert all(found.base_name(name) for name in found.names())

    def test_prefixes_that_fit_equally_well_are_refused(self, tmp_path):
        base = write(tmp_path / "base", {"model.w.weight": torch.ones(4, 3), "transformer.w.weight": torch.ones(4, 3)})
        tuned = write(tmp_path / "tuned", {"w.weight": torch.zeros(4, 3)})
        with pytest.raises(CheckpointError, match="could be"):
            models(base, tuned)

    def test_strangers_are_refused(self, tmp_path):
        base = write(tmp_path / "base", {"x.weight": torch.randn(4, 3)})
        tuned = write(tmp_path / "tuned", {"y.weight": torch.randn(4, 3)})
        with pytest.raises(CheckpointError, match="no matrix in common"):
            models(base, tuned)


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("gpt_neox.embed_in.weight", (9, 4), "embedding"),
        ("embed_out.weight", (9, 4), "head"),
        ("transformer.ln_f.weight", (4,), "norm"),
        ("a.bias", (4,), "bias"),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 4, 4), "linear"),
        ("rotary.inv_freq", (4,), "other"),
    ],
)
def test_roles_come_from_names_and_shapes(name, shape, role):
    assert role_of(name, shape) == role
