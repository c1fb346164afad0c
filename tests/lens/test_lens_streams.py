"""Positions in padded batches, and what is kept."""

from __future__ import annotations

import pytest
import torch
from lens_families import build_family, sample_ids

from deltakeeper.errors import LensError
from deltakeeper.lens import capture, find_blocks

pytestmark = pytest.mark.filterwarnings("ignore")


def padded(rows, side):
    """Rows of 7, 4 and 5 tokens in one batch of 7."""
    ids, mask = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.int64)
    for i, length in enumerate((7, 4, 5)):
        span = slice(0, length) if side == "right" else slice(7 - length, 7)
        ids[i, span], mask[i, span] = rows[i, :length], 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt", "bloom", "mixtral"])
def test_padding_changes_nothing(kind, side):
    model, rows = build_family(kind), sample_ids(3)
    ids, mask = padded(rows, side)
    streams = capture(model, ids, mask, positions=[0, 2, -2, -1])
    for i, length in enumerate((7, 4, 5)):
        alone = capture(model, rows[i : i + 1, :length], positions=[0, 2, -2, -1])
        assert torch.equal(streams.tokens[i], alone.tokens[0])
        assert torch.allclose(streams.block[:, i], alone.block[:, 0], atol=1e-5)
        assert torch.allclose(streams.logits[i], alone.logits[0], atol=1e-5)


def test_positions_of_each_row_and_of_all():
    model, ids = build_family("llama"), sample_ids(2)
    everything = capture(model, ids)
    assert everything.block.shape == (2, 2, 7, 32)
    assert torch.equal(everything.tokens, ids)
    each = capture(model, ids, positions=torch.tensor([[-1, 0], [3, -7]]))
    assert each.positions.tolist() == [[6, 0], [3, 0]]
    assert torch.equal(each.block[:, 1, 0], everything.block[:, 1, 3])
    assert torch.allclose(each.logits[0], everything.logits[0, [6, 0]], atol=1e-6)
    assert torch.equal(each.select(slice(1, 2)).logits, each.logits[1:])
    assert capture(model, ids, logits=False).logits is None


def test_streams_are_hidden_states_of_the_layers():
    model, ids = build_family("llama", num_hidden_layers=3), sample_ids()
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    streams = capture(model, ids)
    assert torch.equal(streams.block[:-1], torch.stack(states[1:-1]))  # the last one is normed there
    assert find_blocks(model) == list(model.model.layers)


def test_wrong_positions_and_masks_say_so():
    model, ids = build_family("llama"), sample_ids(3)
    padded_ids, mask = padded(ids, "right")
    with pytest.raises(LensError, match="differ in length"):
        capture(model, padded_ids, mask)
    with pytest.raises(LensError, match=r"position 4 lies outside the text of row 1; the shortest row has 4 tokens"):
        capture(model, padded_ids, mask, positions=[4])
    with pytest.raises(LensError, match="position -8 lies outside"):
        capture(model, ids, positions=[-8])
    with pytest.raises(LensError, match="none is given"):
        capture(model, ids, positions=[])
    mask[0, 3] = 0
    with pytest.raises(LensError, match="a hole"):
        capture(model, padded_ids, mask, positions=[-1])
    with pytest.raises(LensError, match="is training"):
        capture(model.train(), ids)
    with pytest.raises(LensError, match="no configuration"):
        find_blocks(torch.nn.Linear(2, 2))
