"""What the rules say of each tensor, from headers alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from deltakeeper.checkpoint import Checkpoint, open_checkpoint
from deltakeeper.codecs import BitDelta, Svd
from deltakeeper.codecs.auto import Auto
from deltakeeper.delta import TensorDelta, pair
from deltakeeper.errors import CodecError
from deltakeeper.plan import Choice, Rules, choose_codec, group_of, in_order, unchanged

SHAPES = {
    "model.embed_tokens.weight": (96, 64),
    "lm_head.weight": (96, 64),
    "model.layers.0.mlp.weight": (64, 64),
    "model.layers.0.experts": (4, 32, 64),
    "model.layers.0.tiny.weight": (8, 8),
    "model.layers.0.norm.weight": (64,),
    "model.layers.0.mlp.bias": (64,),
}


def save(folder, shapes, seed):
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    save_file({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Base and fine-tune of the shapes given; reading a tensor is a failure."""
    opened = []

    def build(tuned=SHAPES, base=SHAPES):
        folders = save(tmp_path / "base", base, 0), save(tmp_path / "tuned", tuned, 1)
        opened.extend(open_checkpoint(folder) for folder in folders)
        models = pair(*opened)
        monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("the plan read a tensor"))
        return models

    yield build
    for checkpoint in opened:
        checkpoint.close()


def test_the_default_rules_encode_every_matrix_and_keep_vectors(make):
    models, rules = make(), Rules(BitDelta())
    found = {name: rules.decide(models, name) for name in SHAPES}
    encoded = {name for name, choice in found.items() if choice == Choice("terms", BitDelta())}
    assert encoded == {name for name, shape in SHAPES.items() if len(shape) > 1 and "tiny" not in name}
    assert {found[name] for name in set(SHAPES) - encoded} == {Choice("value")}
    assert [group_of(models, name) for name in SHAPES] == ["embedding", "head", *["linear"] * 3, *["norms"] * 2]


@pytest.mark.parametrize(
    ("rule", "choice"),
    [
        ("dense", Choice("value")),
        ("base", Choice("base")),
        ("svd:rank=3", Choice("terms", Svd(rank=3))),
        ("codec", Choice("terms", BitDelta())),
    ],
)
def test_embeddings_and_head_have_a_rule_of_their_own(make, rule, choice):
    models, rules = make(), Rules(BitDelta(), embeddings=rule)
    assert {rules.decide(models, n) for n in ("model.embed_tokens.weight", "lm_head.weight")} == {choice}
    assert rules.decide(models, "model.layers.0.mlp.weight") == Choice("terms", BitDelta())


def test_norms_and_biases_can_come_from_the_base(make):
    models, rules = make(), Rules(BitDelta(), norms="base")
    for name in ("model.layers.0.norm.weight", "model.layers.0.mlp.bias"):
        assert rules.decide(models, name) == Choice("base")
    assert rules.decide(models, "model.layers.0.tiny.weight") == Choice("value")


def test_added_rows_cannot_come_from_the_base(make):
    models = make(tuned=SHAPES | {"lm_head.weight": (100, 64)})
    with pytest.raises(CodecError, match=r"'lm_head.weight' cannot .* added 4 rows .* store embeddings otherwise"):
        Rules(BitDelta(), embeddings="base").decide(models, "lm_head.weight")
    assert Rules(BitDelta()).decide(models, "lm_head.weight").treatment == "terms"


def test_what_the_base_lacks_cannot_come_from_it(make):
    models = make(base={n: s for n, s in SHAPES.items() if "bias" not in n and "embed" not in n})
    rules = Rules(BitDelta(), embeddings="base", norms="base")
    for name, option in (("model.layers.0.mlp.bias", "norms"), ("model.embed_tokens.weight", "embeddings")):
        with pytest.raises(CodecError, match=f"'{name}' cannot .* lacks it; store {option} otherwise"):
            rules.decide(models, name)
    assert Rules(BitDelta()).decide(models, "model.embed_tokens.weight") == Choice("value")


def test_a_shrunk_vocabulary_cannot_come_from_the_base(make):
    models = make(tuned=SHAPES | {"lm_head.weight": (90, 64)})
    with pytest.raises(CodecError, match=r"it is \(96, 64\) there, \(90, 64\) here"):
        Rules(BitDelta(), embeddings="base").decide(models, "lm_head.weight")


@pytest.mark.parametrize("rule", ["svd:rank=0", "bitdleta", ""])
def test_an_unknown_rule_for_embeddings_is_explained(rule):
    with pytest.raises(CodecError, match="choose codec, dense, base or a codec"):
        Rules(BitDelta(), embeddings=rule)


def test_an_unknown_rule_for_norms_is_explained():
    with pytest.raises(CodecError, match="norms cannot be stored as 'codec'; choose dense or base"):
        Rules(BitDelta(), norms="codec")


def test_auto_needs_a_budget():
    assert choose_codec("auto", budgeted=True) == Auto()
    assert choose_codec("svd:rank=2") == Svd(rank=2)
    with pytest.raises(CodecError, match="--target-size"):
        choose_codec("auto")
    with pytest.raises(CodecError, match="--target-size"):
        Auto().encode(torch.ones(2, 2), name="w")


def test_layers_are_in_their_own_order():
    ordered = ["head", "layers.9.a", "layers.9.b", "layers.10.a"]
    assert in_order(sorted(ordered)) == ordered


@pytest.mark.parametrize(
    ("base", "tuned", "same"),
    [
        (torch.tensor([1.0, math_nan := float("nan")]), torch.tensor([1.0, math_nan]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.bfloat16), False),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), True),
        (torch.tensor(3.0), torch.tensor(3.0), True),
        (torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [2.0]]), False),
    ],
)
def test_unchanged_means_equal_bytes(base, tuned, same):
    class Models:
        class tuned:  # noqa: N801
            tensors = {"w": tuned}  # noqa: RUF012

    assert unchanged(Models, TensorDelta("w", "linear", base, tuned, False)) is same
