"""Rankings of layers as weights of a byte budget: spared or starved, read strictly, said in the artifact's card."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from deltakeeper.commands.compress import _read_weights
from deltakeeper.commands.plan_table import show_plan
from deltakeeper.compress import compress
from deltakeeper.errors import CodecError, DataError
from deltakeeper.lens.layer_weights import LEAST, LayerWeights, read_layer_weights
from deltakeeper.lens.ranking import LayerRanking, Origin, RankedPlace
from deltakeeper.lens.restored import Place
from deltakeeper.testing import write_pair

PLACES = (
    RankedPlace(Place("layer", (1,)), 0.8, 0.7, 0.9),
    RankedPlace(Place("outside", ()), 0.2),
    RankedPlace(Place("layer", (0,)), -0.1),
)
RANKING = LayerRanking(PLACES, "base", "tuned", "tuned with the delta of base", "restored", 4)
NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def test_shares_become_weights_and_nothing_is_given_up():
    spared = LayerWeights(RANKING, "spare", "x").weights(NAMES)
    assert list(spared.values()) == pytest.approx([LEAST, 1.0, 0.25])
    starved = LayerWeights(RANKING, "starve", "x").weights(NAMES)
    assert list(starved.values()) == pytest.approx([1.0, LEAST, 0.75])


@pytest.mark.parametrize(
    ("places", "names", "told"),
    [
        (
            [RankedPlace(Place("layer", (0,)), None)],
            ["h.0.w"],
            "anything back, so none can be starved",
        ),
        ([RankedPlace(Place("layer", (0,)), 0.1, -0.1, 0.3)], ["h.0.w"], "no layer that puts anything back"),
        ([RankedPlace(Place("layer", (4,)), 0.5)], ["h.0.w"], "ranks other layers than this fine-tune has"),
        ([RankedPlace(Place("layer", (0,)), 0.5)], ["h.0.w", "h.1.w"], "ranks other layers"),
    ],
)
def test_a_ranking_that_says_nothing_of_this_fine_tune_is_told(places, names, told):
    ranking = LayerRanking(tuple(places), "a", "b", "", "restored", 1)
    with pytest.raises(DataError, match=told):
        LayerWeights(ranking, "starve", "x").weights(names)


@pytest.mark.parametrize("whole", [True, False])
def test_it_is_read_alone_or_from_what_patching_wrote(tmp_path, whole):
    value = {"rankings": {"layer": RANKING.to_json()}} if whole else RANKING.to_json()
    found = read_layer_weights(write(tmp_path / "r.json", value), "spare")
    assert found.ranking == RANKING and found.option == "spare-layers"


def test_a_file_of_version_1_is_read_and_knows_no_pair(tmp_path):
    value = {key: item for key, item in RANKING.to_json().items() if key != "origin"} | {"version": 1}
    found = read_layer_weights(write(tmp_path / "r.json", value), "spare")
    assert found.ranking == RANKING
    found.check_pair(None, None)  # there is nothing that it could be held to


def test_a_ranking_of_another_pair_is_refused_before_anything_is_written(tmp_path):
    base, tuned = write_pair("llama", tmp_path, dtype=torch.float32)
    ranking = replace(RANKING, origin=Origin("0" * 64, "0" * 64, "1" * 64))
    weigh = read_layer_weights(write(tmp_path / "r.json", ranking.to_json()), "starve")
    for attempt in (
        lambda: compress(base, tuned, tmp_path / "no", "svd", target_ratio=3, weigh=weigh),
        lambda: show_plan(base, tuned, "svd", target_ratio="3", weigh=weigh),
    ):
        with pytest.raises(DataError, match="ranks layers of another base than"):
            attempt()
    assert not (tmp_path / "no").exists()


def test_the_command_line_says_that_an_old_ranking_names_no_pair(tmp_path, capsys):
    path = write(tmp_path / "r.json", RANKING.to_json())
    assert _read_weights(path, None).option == "spare-layers" and _read_weights(None, None) is None
    assert "does not say which pair" in capsys.readouterr().err


@pytest.mark.parametrize("value", [[], {}, {"rankings": {}}, {"rankings": {"layer": 3}}, {**RANKING.to_json(), "a": 1}])
def test_what_is_no_ranking_is_told(tmp_path, value):
    with pytest.raises(DataError, match="no sound ranking"):
        read_layer_weights(write(tmp_path / "r.json", value), "spare")


def test_other_files_are_told(tmp_path):
    with pytest.raises(DataError, match="no ranking of layers in"):
        read_layer_weights(tmp_path / "none.json", "spare")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_layer_weights(tmp_path / "r.json", "spare")
    twice = LayerRanking((PLACES[0], PLACES[0]), "a", "b", "", "restored", 1)
    with pytest.raises(DataError, match="ranks a layer twice"):
        read_layer_weights(write(tmp_path / "r.json", twice.to_json()), "spare")
    parts = LayerRanking((RankedPlace(Place("mlp", (0,)), 0.5),), "a", "b", "", "restored", 1)
    with pytest.raises(DataError, match="does not rank the deltas of single layers"):
        read_layer_weights(write(tmp_path / "r.json", parts.to_json()), "spare")


def test_starved_layers_get_fewer_bytes_and_the_card_says_so(tmp_path):
    base, tuned = write_pair("llama", tmp_path, dtype=torch.float32)
    path = write(tmp_path / "r.json", RANKING.to_json())
    sizes = {}
    for use in ("spare", "starve"):
        weigh = read_layer_weights(path, use)
        report = compress(base, tuned, tmp_path / use, "svd", target_ratio=3, weigh=weigh)
        stored = {name: one.stored_bytes for name, one in report.tensors.items() if "proj" in name}
        sizes[use] = [sum(size for name, size in stored.items() if f".layers.{n}." in name) for n in (0, 1)]
        assert f"--{use}-layers {path}" in (tmp_path / use / "README.md").read_text()
    assert sizes["spare"][1] > sizes["starve"][1] and sizes["spare"][0] < sizes["starve"][0]
    with pytest.raises(CodecError, match="give a target size or ratio"):
        compress(base, tuned, tmp_path / "no", "svd:rank=2", weigh=read_layer_weights(path, "spare"))
    assert not (tmp_path / "no").exists()
    with pytest.raises(CodecError, match="give a target size or ratio"):
        show_plan(base, tuned, "svd:rank=2", weigh=read_layer_weights(path, "spare"))
