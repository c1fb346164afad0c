"""The last layer's lens is the model's own logits, for every causal language model that can be built small."""

from __future__ import annotations

import pytest
import torch
from lens_families import LEFT_OUT, REFUSED, build_family, causal_classes, sample_ids

from deltakeeper.errors import LensError
from deltakeeper.lens import capture, check_identity, decode

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's models
READ = sorted(set(causal_classes()) - set(LEFT_OUT))


def test_most_families_are_read():
    assert len(READ) >= 40
    assert set(REFUSED) <= set(LEFT_OUT) <= set(causal_classes())


@pytest.mark.parametrize("kind", READ)
def test_the_last_layer_says_what_the_model_says(kind):
    model, ids = build_family(kind), sample_ids()
    with torch.no_grad():
        plain = model(ids).logits
    streams = capture(model, ids)
    assert torch.allclose(streams.logits, plain, atol=1e-5)
    (decoded,) = decode(model, streams, output="logits")
    assert decoded.values.shape == (streams.layers, *plain.shape)
    size = plain.abs().max()
    assert (decoded.values[-1] - plain).abs().max() <= 1e-5 * size
    assert (decoded.values[0] - plain).abs().max() > 1e-3 * size
    check_identity(model, streams)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused(kind):
    model, ids = build_family(kind), sample_ids()
    with pytest.raises(LensError, match=r"."):
        check_identity(model, capture(model, ids))
