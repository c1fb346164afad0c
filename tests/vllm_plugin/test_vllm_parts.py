"""The parts of the plugin that need no vLLM: rows, lanes, places, keys of the cache, what is refused at start."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from deltakeeper.codecs import parse_codec
from deltakeeper.errors import DataError, OverlayError
from deltakeeper.fingerprint import fingerprint
from deltakeeper.kernels.terms import held_terms, hold
from deltakeeper.vllm_plugin import cache_keys
from deltakeeper.vllm_plugin.base_model import VARIABLE, base_root, refuse_unsupported
from deltakeeper.vllm_plugin.lanes import Lane
from deltakeeper.vllm_plugin.rows import CurrentRows, SlotRows
from deltakeeper.vllm_plugin.sites import NormSite

ROWS = torch.tensor([0, 2, 2, 0, 1, 3, 1])


def terms_of(spelling, shape, seed=0):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    return parse_codec(spelling).encode(delta, name="weight")


def filled_lane(columns, width, bias=None):
    """Slot 1 has two terms, slot 2 a matrix of its own, slot 3 another bias; gives the lane and what each is."""
    lane = Lane(columns, width, 5, bias)
    terms = terms_of("dqrelo:rank=2", lane.shape)
    held = [hold(term) for term in terms]
    matrix = torch.randn(lane.shape, generator=torch.Generator().manual_seed(1))
    lane.put(1, [term.id for term in held])
    lane.put_matrix(2, matrix)
    lane.put_bias(3, torch.full(lane.shape[:1], 0.5))
    return lane, sum(term.to_dense() for term in terms), matrix, held


def test_a_lane_changes_its_columns_of_the_rows_of_its_slots():
    x, base = torch.randn(len(ROWS), 40), torch.randn(24, 40)
    bias = torch.randn(24)
    lane, delta, matrix, held = filled_lane(slice(8, 24), 40, bias[8:])
    y = F.linear(x, base, bias)
    expected = y.clone()
    expected[4:7:2, 8:] += x[4:7:2] @ delta.T
    expected[1:3, 8:] = F.linear(x[1:3], matrix, bias[8:])
    expected[5, 8:] += 0.5 - bias[8:]
    lane.add_product_(y, x, SlotRows.of(ROWS))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(y[ROWS == 0], F.linear(x, base, bias)[ROWS == 0]), "rows of the base keep their bits"
    for slot in (1, 2, 3):
        lane.clear(slot)
        assert not lane.holds_any(frozenset([slot]))
    again = F.linear(x, base, bias)
    lane.add_product_(again, x, SlotRows.of(ROWS))
    assert torch.equal(again, F.linear(x, base, bias))
    assert len(held) == 2


def test_a_lane_of_an_embedding_adds_the_rows_of_its_slots():
    ids, base = torch.tensor([3, 1, 0, 2, 5, 4, 5]), torch.randn(16, 40)
    lane, delta, matrix, held = filled_lane(slice(0, 16), 40)
    y = base[ids]
    expected = y.clone()
    expected[4:7:2] += delta[ids[4:7:2]]
    expected[1:3] = matrix[ids[1:3]]
    lane.add_rows_(y, ids, SlotRows.of(ROWS))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert held


def test_terms_are_let_go_with_what_holds_them():
    before = held_terms()
    found = filled_lane(slice(0, 16), 40)
    assert held_terms() == before + 2
    del found
    assert held_terms() == before


@pytest.mark.parametrize("heads", [(), (3,)])
def test_a_norm_has_the_weight_of_each_rows_slot(heads):
    module = SimpleNamespace(weight=torch.randn(8), variance_epsilon=1e-5)
    rows = CurrentRows()
    site = NormSite("norm", module, 5, rows)
    own = torch.randn(8)
    site.put(1, own)
    rows.begin(ROWS - 1, ROWS - 1)
    x = torch.randn(len(ROWS), *heads, 8)
    y = F.rms_norm(x, (8,), module.weight, 1e-5)
    expected = torch.where((ROWS == 1).view(-1, *(1 for _ in x.shape[1:])), F.rms_norm(x, (8,), own, 1e-5), y)
    site.apply_(y, x)
    torch.testing.assert_close(y, expected)
    site.clear(1)
    again = y.clone()
    site.apply_(y, x)
    assert torch.equal(y, again)


def test_logits_are_asked_for_sampled_rows_or_for_runs_of_rated_ones():
    rows, hidden = CurrentRows(), torch.randn(7, 4)
    rows.begin(torch.tensor([0, 0, 0, -1, -1, 1, 1]), torch.tensor([0, -1, 1]))
    assert rows.of_logits(hidden[[2, 4, 6]]).groups.row_slots.tolist() == [1, 0, 2]
    with rows.rating_prompts(hidden):
        assert rows.of_logits(hidden[3:7]).groups.row_slots.tolist() == [0, 0, 2, 2]
        assert rows.of_logits(hidden[:2]).groups.row_slots.tolist() == [1, 1]
        with pytest.raises(OverlayError, match="cannot be told"):
            rows.of_logits(torch.randn(2, 4))
    with pytest.raises(OverlayError, match="cannot be told"):
        rows.of_logits(hidden)


def request(number, path, in_place=False):
    lora = SimpleNamespace(lora_int_id=number, lora_path=str(path), load_inplace=in_place)
    return lora, SimpleNamespace(lora_request=lora)


def keys_of(number):
    """The keys of a request that comes now."""
    return cache_keys.load_of(request(number, "")[1])


def test_every_load_of_an_artifact_has_keys_of_its_own(tmp_path):
    (tmp_path / "delta_config.json").write_text("{}")
    lora, running = request(901, tmp_path)
    cache_keys.note_load(lora)
    first = cache_keys.load_of(running)
    cache_keys.note_load(lora)  # vLLM touches what it has already
    assert keys_of(901) == first != []
    cache_keys.note_load(request(901, tmp_path, in_place=True)[0])
    assert keys_of(901) != first
    assert cache_keys.load_of(running) == first, "what a request began with stays its own"
    cache_keys.note_load(request(902, tmp_path)[0])
    assert keys_of(902) != keys_of(901)


def test_keys_of_ordinary_adapters_and_of_the_base_stay_those_of_vllm(tmp_path):
    cache_keys.note_load(request(903, tmp_path)[0])
    assert keys_of(903) == []
    assert cache_keys.load_of(SimpleNamespace(lora_request=None)) == []


def test_loads_are_forgotten_and_the_keys_of_what_comes_again_are_nobodys(tmp_path):
    (tmp_path / "delta_config.json").write_text("{}")
    loads = cache_keys.Loads(most=2)
    found = {}
    for number in (1, 2, 3):
        loads.note(request(number, tmp_path)[0])
        found[number] = loads.of(request(number, "")[1])
        loads.of(request(1, "")[1])  # what is asked stays
    assert loads.of(request(1, "")[1]) == found[1] and loads.of(request(3, "")[1]) == found[3]
    late = loads.of(request(2, "")[1])
    assert late == loads.of(request(2, "")[1]) and late not in ([], *found.values())
    assert loads.of(SimpleNamespace(lora_request=None)) == [] and len(loads._current) == 2


def vllm_config(**changed):
    found = {
        "parallel_config": SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        "lora_config": SimpleNamespace(fully_sharded_loras=False),
        "model_config": SimpleNamespace(is_moe=False, is_multimodal_model=False),
        "speculative_config": None,
        "quant_config": None,
        "use_v2_model_runner": False,
    }
    return SimpleNamespace(**found | changed)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"parallel_config": SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1)}, "tensor-parallel"),
        ({"parallel_config": SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=2)}, "pipeline-parallel"),
        ({"lora_config": SimpleNamespace(fully_sharded_loras=True)}, "fully-sharded"),
        ({"model_config": SimpleNamespace(is_moe=True, is_multimodal_model=False)}, "mixture of experts"),
        ({"speculative_config": object()}, "speculative"),
        ({"quant_config": object()}, "quantised"),
    ],
)
def test_what_would_be_served_wrong_stops_the_start(changed, named):
    refuse_unsupported(vllm_config(), "cpu")
    with pytest.raises(DataError, match=named):
        refuse_unsupported(vllm_config(**changed), "cpu")
    with pytest.raises(DataError, match="cuda"):
        refuse_unsupported(vllm_config(), "cuda")


def test_the_base_is_known_by_its_folder_or_by_what_the_environment_says(tmp_path, monkeypatch):
    from deltakeeper.checkpoint import open_checkpoint
    from deltakeeper.testing import write_pair

    base, _ = write_pair("llama", tmp_path)
    with open_checkpoint(base) as checkpoint:
        assert base_root(str(base), "auto") == fingerprint(checkpoint).root
    for model, form in (("organisation/model", "auto"), (str(base), "dummy")):
        with pytest.raises(DataError, match=VARIABLE):
            base_root(model, form)
    monkeypatch.setenv(VARIABLE, "a" * 64)
    assert base_root("organisation/model", "auto") == "a" * 64
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(DataError, match="64 hex digits"):
        base_root(str(base), "auto")


def test_importing_the_plugin_imports_no_vllm_and_its_entry_point_is_there():
    code = "import sys; from deltakeeper.vllm_plugin import register; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"deltakeeper": "deltakeeper.vllm_plugin:register"}


def test_a_vllm_that_it_was_never_tested_with_is_left_alone(monkeypatch):
    from deltakeeper.vllm_plugin.versions import TESTED, untested

    for version, stays_off in ((TESTED[0], False), (f"{TESTED[0]}+cpu", False), ("0.99.1", True)):
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
        assert (untested() is not None) == stays_off


def test_the_page_of_results_has_a_row_for_every_model(measured):
    side = {"same_answers": 5, "same_first_tokens": 6, "largest_gap": 0.0625, "mean_gap": 0.0125}
    both = {"prompts": 6, "tokens": 16, "beside_reference": side, "mixed_beside_alone": side}
    sizes = {"held_bytes": 21_000_000, "artifact_bytes": 22_000_000, "dense_bytes": 269_000_000}
    loads = {"load_ms": 512.4, "growth_bytes": 30_000_000}
    models = [{"model": "base"} | both, {"model": "lora"} | both | loads, {"model": "one"} | both | loads | sizes]
    text = measured.plugin.tables({"vllm": "0.32.0", "dtype": "bfloat16", "models": models})
    lines = text.splitlines()
    assert "| base | 0.062 | 0.0125 | 5/6 | 0.062 | 0.0125 | 5/6 |" in lines
    assert "| one | 512 | 21.0 | 22.0 | 30.0 | 269.0 |" in lines
    assert "| lora | 512 |  |  | 30.0 |  |" in lines
