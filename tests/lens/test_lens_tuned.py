"""The tuned lens: identity at the start, closer to the final distribution after, and files that are read strictly."""

from __future__ import annotations

import pytest
import torch
from lens_families import build_family, sample_ids

from deltakeeper.errors import LensError
from deltakeeper.lens import Models, capture, check_identity, decode
from deltakeeper.lens.metrics import kl
from deltakeeper.lens.tuned import Translators, affine, measure_kl, report_tuned
from deltakeeper.lens.tuned_fit import TunedSettings, fit_translators, hash_rows

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = "ab" * 32
LAYERS = 4


def write_rows(count, seed, length=16):
    """Text of a Markov chain: what comes next depends on what is there."""
    chain = torch.rand(57, 57, generator=torch.Generator().manual_seed(99)).pow(12)
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(57, (count,), generator=generator)]
    for _ in range(length - 1):
        ids.append(torch.multinomial(chain[ids[-1]], 1, generator=generator)[:, 0])
    return list(torch.stack(ids, 1) + 3)


@pytest.fixture(scope="module")
def trained():
    """A tiny model that has learnt the chain, and its translators."""
    model = build_family("llama", num_hidden_layers=LAYERS)
    rows = torch.stack(write_rows(256, seed=0))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(150):
        ids = rows[(step * 32) % 256 :][:32]
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.zero_grad(set_to_none=True)
    told = []
    lens = fit_translators(
        model,
        write_rows(64, seed=1),
        base_root=ROOT,
        settings=TunedSettings(steps=120, rows=16),
        tell=lambda step, losses: told.append((step, losses)),
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [step for step, _ in told] == list(range(120)) and told[0][1].shape == (LAYERS - 1,)
    return model, lens


def whole(model, streams):
    return torch.cat([chunk.values for chunk in decode(model, streams)])


def test_a_tuned_lens_is_closer_to_the_end_on_other_text(trained):
    model, lens = trained
    found = report_tuned(model, lens, write_rows(32, seed=2))
    assert found.tokens == 32 * 16
    assert (found.after[:-1] < 0.85 * found.before[:-1]).all()
    assert found.before[-1] == pytest.approx(0, abs=1e-6) == pytest.approx(found.after[-1], abs=1e-6)
    assert lens.steps == 120 and lens.base_root == ROOT and lens.text_sha256 == hash_rows(write_rows(64, seed=1))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "cohere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_translators_are_the_identity_to_the_bit(kind, dtype):
    model, ids = build_family(kind).to(dtype), sample_ids()
    streams = capture(model, ids)
    lens = Translators.identity(streams.layers, streams.block.shape[-1], ROOT)
    moved = lens.translate(streams)
    assert torch.equal(moved.block, streams.block) and moved.block.dtype == dtype
    assert torch.equal(whole(model, moved), whole(model, streams))


def test_the_last_layer_is_never_translated(trained):
    model, lens = trained
    ids = sample_ids(3)
    streams = capture(model, ids, positions=[1, -1], parts=("block", "mlp"))
    moved = lens.translate(streams)
    assert moved.mlp is None and torch.equal(moved.block[-1], streams.block[-1])
    assert not torch.equal(moved.block[0], streams.block[0])
    check_identity(model, moved)
    expected = streams.block[1] + streams.block[1] @ lens.weight[1].T + lens.bias[1]
    assert torch.allclose(moved.block[1], expected, atol=1e-6)
    models = Models({"base": model, "again": model})
    captured = {name: lens.translate(one) for name, one in models.capture(ids).items()}
    models.check_identity(captured)
    for chunk in models.decode(captured, tail="base"):
        assert torch.allclose(chunk["base"].values, chunk["again"].values)


def test_kl_by_brute_force(trained):
    model, lens = trained
    rows = [*write_rows(5, seed=3), torch.arange(3, 10)]
    sums, count = torch.zeros(LAYERS, dtype=torch.float64), 0
    for row in rows:
        streams = lens.translate(capture(model, row[None]))
        final = streams.logits.log_softmax(-1)
        sums += kl(final, whole(model, streams)).double().sum((1, 2))
        count += len(row)
    assert measure_kl(model, rows, lens) == pytest.approx((sums / count).numpy(), abs=1e-6)
    cells = 16 * 64 * 16
    assert measure_kl(model, rows, lens, memory=cells) == pytest.approx((sums / count).numpy(), abs=1e-6)
    with pytest.raises(LensError, match="no text"):
        measure_kl(model, [])


def test_gradients_and_steps_by_brute_force(trained):
    """Two steps, in chunks of one layer, against autograd through a copy of norm and head."""
    model, _ = trained
    rows = [*write_rows(3, seed=4), torch.arange(3, 10)]
    settings = TunedSettings(steps=2, rows=4, clip=1e9, decay=0.1)
    found = fit_translators(model, rows, base_root=ROOT, settings=settings, memory=16 * 64 * 16 * 3)
    weight, bias = torch.zeros(3, 32, 32, requires_grad=True), torch.zeros(3, 32, requires_grad=True)
    optimiser = torch.optim.SGD([weight, bias], lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
    tokens = sum(map(len, rows))
    for rate in (0.1, 0.05):
        optimiser.param_groups[0]["lr"] = rate
        loss = torch.zeros(())
        for row in rows:
            streams = capture(model, row[None])
            moved = torch.stack([affine(streams.block[i], weight[i], bias[i]) for i in range(3)])
            log_q = model.lm_head(model.model.norm(moved)).log_softmax(-1)
            loss = loss + kl(streams.logits.log_softmax(-1), log_q).sum() / tokens
        weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
        optimiser.step()
    for ours, theirs in ((found.weight, weight), (found.bias, bias)):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max() and theirs.abs().max() > 1e-3


def test_the_same_seed_gives_the_same_lens(trained):
    model, _ = trained
    rows, settings = write_rows(6, seed=5), TunedSettings(steps=3, rows=4, seed=7)
    one, other = (fit_translators(model, rows, base_root=ROOT, settings=settings) for _ in range(2))
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)


def test_wrong_use_of_a_tuned_lens_says_so(trained):
    model, lens = trained
    other = build_family("llama", num_hidden_layers=3)
    with pytest.raises(LensError, match="of 4 layers of width 32, and the model has 3"):
        lens.translate(capture(other, sample_ids()))
    with pytest.raises(LensError, match="no text"):
        fit_translators(model, [], base_root=ROOT)
    with pytest.raises(LensError, match="single layer"):
        fit_translators(build_family("llama", num_hidden_layers=1), write_rows(2, 0), base_root=ROOT)
    with pytest.raises(LensError, match="diverged"):
        fit_translators(model, write_rows(2, 0), base_root=ROOT, settings=TunedSettings(rate=1e30, clip=1e30))
    with pytest.raises(LensError, match="more memory"):
        fit_translators(model, write_rows(2, 0), base_root=ROOT, memory=100)
    for wrong in ({"steps": 0}, {"momentum": 1.0}, {"rate": 0.0}, {"clip": -1.0}):
        with pytest.raises(LensError, match="a tuned lens needs"):
            TunedSettings(**wrong)
