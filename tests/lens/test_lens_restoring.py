"""The model is given back as it was, whatever happens, and a lens that does not say what the model says is refused."""

from __future__ import annotations

import threading
import types

import pytest
import torch
from lens_families import build_family, sample_ids

from deltakeeper.errors import LensError
from deltakeeper.lens import capture, check_identity, decode

pytestmark = pytest.mark.filterwarnings("ignore")


def state_of(model):
    """What any module has of its own, hooks included."""
    return {
        name: {k: (id(v), len(v)) if "hooks" in k else id(v) for k, v in m.__dict__.items() if not k.startswith("__")}
        for name, m in model.named_modules()
    }


def lens(model, ids):
    streams = capture(model, ids, positions=[-1])
    return torch.cat([chunk.values for chunk in decode(model, streams, output="logits")])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "bloom"])
def test_nothing_is_left_behind(kind):
    model, ids = build_family(kind), sample_ids()
    plain = model(ids).logits
    before = state_of(model)
    lens(model, ids)
    assert state_of(model) == before
    assert torch.equal(model(ids).logits, plain)


def test_a_forward_on_the_instance_is_used_and_put_back():
    model, ids = build_family("llama"), sample_ids()
    found = lens(model, ids)
    calls = []

    def wrap(block):
        own = block.forward

        def forward(self, *args, **kwargs):
            calls.append(1)
            return own(*args, **kwargs)

        block.forward = types.MethodType(forward, block)
        return block.forward

    wrapped = [wrap(block) for block in model.model.layers]
    assert torch.equal(lens(model, ids), found)
    assert calls
    assert [block.__dict__["forward"] for block in model.model.layers] == wrapped


def test_hooks_of_others_steer_the_streams_once():
    model, ids = build_family("llama"), sample_ids()
    push = torch.randn(32, generator=torch.Generator().manual_seed(1))
    handle = model.model.layers[-1].register_forward_hook(lambda m, a, out: out + push)
    streams = capture(model, ids)
    check_identity(model, streams)
    handle.remove()
    assert torch.allclose(capture(model, ids).block[-1] + push, streams.block[-1], atol=1e-6)


@pytest.mark.parametrize("where", ["block", "tail"])
def test_after_an_exception_the_model_is_as_it_was(where):
    model, ids = build_family("llama"), sample_ids()
    streams = capture(model, ids)
    plain, before = model(ids).logits, state_of(model)
    broken = model.model.layers[0].mlp if where == "block" else model.lm_head
    seen = []

    def fail(*args):
        seen.append(1)
        if where == "block" or len(seen) > 1:  # the first pass learns what blocks return
            raise RuntimeError("broken on purpose")

    handle = broken.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        capture(model, ids) if where == "block" else list(decode(model, streams))
    handle.remove()
    assert state_of(model) == before
    assert torch.equal(model(ids).logits, plain)
    check_identity(model, streams)


def test_a_tail_that_reads_more_than_the_last_stream_is_refused():
    model, ids = build_family("llama"), sample_ids()
    own = model.forward

    def forward(input_ids, **more):
        out = own(input_ids, **more)
        out.logits = out.logits + 0.01 * input_ids.cumsum(1)[:, -1:, None]  # of other positions too
        return out

    model.forward = forward
    streams = capture(model, ids, positions=[-1])
    with pytest.raises(LensError, match=r"lens of 'tuned' misses its own logits at the last layer by \d"):
        check_identity(model, streams, name="tuned")


def test_a_model_that_remembers_passes_is_refused():
    model, ids = build_family("llama"), sample_ids()
    streams = capture(model, ids)
    with torch.no_grad():
        model.lm_head.weight.mul_(1 + 1e-6)
    with pytest.raises(LensError, match="other logits after the lens than before"):
        check_identity(model, streams)
    assert check_identity(model, streams, rerun=False).error <= 1e-5
    with pytest.raises(LensError, match="were not kept"):
        check_identity(model, capture(model, ids, logits=False))


def test_one_lens_at_a_time():
    model, ids = build_family("llama"), sample_ids()
    inside, go = threading.Event(), threading.Event()
    handle = model.lm_head.register_forward_hook(lambda *a: (inside.set(), go.wait(10), None)[2])
    thread = threading.Thread(target=lens, args=(model, ids))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(LensError, match="another lens"):
        capture(model, ids)
    go.set()
    thread.join()
    handle.remove()
    capture(model, ids)
