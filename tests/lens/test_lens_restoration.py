"""Patching over prompts finds the planted layer, by what models choose themselves; what they agree on is left out."""

from __future__ import annotations

import json

import pytest
import torch
from lens_planted import PLANTED, build, change_lists, disturb

from deltakeeper.errors import LensError
from deltakeeper.lens.ranking import LayerRanking
from deltakeeper.lens.restoration import OUTCOMES, choice_margin, patch_prompts
from deltakeeper.lens.restored import Place


class Digits:
    """A tokenizer of numbers."""

    chat_template = None
    pad_token_id = 0
    unk_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": self.encode(text)}

    def encode(self, text, **_):
        return [int(word) for word in text.split() if word.isdigit()]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


PROMPTS = ["3 4 5 6", "7 8 9", "2 3", "11 12 13 14 15", "4 4 9 2", "8 1 6"]


@pytest.fixture(scope="module")
def planted():
    base = build()
    return base, {k: v for k, v in change_lists(base, ("tuned", disturb(base, [PLANTED], seed=3))).items() if v}


def test_it_finds_the_layer_that_carries_the_effect_and_leaves_the_model_as_it_was(planted):
    base, changes = planted
    before = {name: value.clone() for name, value in base.state_dict().items()}
    found = patch_prompts(base, Digits(), PROMPTS, changes, donor="base", receiver="tuned")
    assert found.left_out + len(found.layers.patched) == len(PROMPTS) and len(found.layers.patched) >= 2
    assert (found.layers.clean > 0).all() and (found.layers.corrupted < 0).all(), "each prefers its own choice"
    ranked = found.rankings()
    assert ranked["layer"].places[0].place == Place("layer", (PLANTED,))
    assert ranked["layer"].places[0].share == pytest.approx(1, abs=1e-3)
    assert ranked["layer"].places[0].low == pytest.approx(1, abs=1e-2)
    assert ranked["stream"].places[0].place.layers == (PLANTED,)
    assert found.streams.sweep.restored() == pytest.approx([0, 0, 1, 1], abs=1e-3)
    assert found.streams.reverse.restored() == pytest.approx([0, 0, 1, 1], abs=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    value = json.loads(json.dumps(found.to_json()))
    assert value["outcome"] == OUTCOMES["choice"] and value["donor"] == "base"
    assert value["restored"]["layers"]["places"] == ["0", "1", "2", "3", "outside"]
    assert LayerRanking.from_json(value["rankings"]["part"]) == ranked["part"]


def test_passes_of_few_prompts_give_the_same(planted):
    base, changes = planted
    whole = patch_prompts(base, Digits(), PROMPTS, changes, donor="base", receiver="tuned")
    some = patch_prompts(base, Digits(), PROMPTS, changes, donor="base", receiver="tuned", prompts_per_pass=2)
    assert some.layers.patched == pytest.approx(whole.layers.patched, abs=1e-4)
    assert some.streams.sweep.patched == pytest.approx(whole.streams.sweep.patched, abs=1e-4)


def test_each_row_is_measured_by_its_own_pair():
    logits = torch.arange(24.0).reshape(2, 2, 6) ** 1.5
    found = choice_margin([1, 5], [0, 2])(logits)
    assert found.tolist() == pytest.approx(
        [(logits[0, :, 1] - logits[0, :, 0]).mean().item(), (logits[1, :, 5] - logits[1, :, 2]).mean().item()]
    )


def test_nothing_to_put_back_and_unknown_names_are_told(planted):
    base, changes = planted
    with pytest.raises(LensError, match="choose another token on 0 of 6 prompts"):
        patch_prompts(base, Digits(), PROMPTS, {"tuned": []}, donor="base", receiver="tuned")
    with pytest.raises(LensError, match="no variant 'other' to patch; name one of base, tuned"):
        patch_prompts(base, Digits(), PROMPTS, changes, donor="other", receiver="tuned")
    with pytest.raises(LensError, match="knows no tokens that open refusals"):
        patch_prompts(base, Digits(), PROMPTS, changes, donor="base", receiver="tuned", outcome="refusal")
