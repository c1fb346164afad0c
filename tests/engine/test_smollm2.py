"""A real model: SmolLM2-135M in bfloat16 with two 1-bit tenants, against its merged models in float32."""

from __future__ import annotations

import shutil

import pytest
import torch
from end_to_end_cases import Service, Tenant, at_rest, engine_of, load_model, opened_store

from deltakeeper.apply import iterate_merged
from deltakeeper.artifact import open_artifact
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.engine import Request, Sampling
from deltakeeper.kernels.library import compiled
from deltakeeper.lab.embedded import prepare_embedded_model

pytestmark = pytest.mark.model
TEXTS = (
    "The capital of France is",
    "Water boils at one hundred degrees, and at the top of a mountain it boils",
    "A short list of what to pack for a week by the sea: a towel, a hat,",
)
TENANTS = (None, "first", "second")
NEW = 12


def tune(base, folder, name, seed):
    """Noise of a tenth of each matrix's spread: more than fine-tunes move, less than would make the model babble."""
    model = load_model(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.ndim == 2:
                weight += torch.randn(weight.shape, generator=generator) * (0.1 * weight.float().std())
    model.save_pretrained(folder / "tuned")
    compress(base, folder / "tuned", folder / "deltas" / name, "bitdelta:scale=row")
    shutil.rmtree(folder / "tuned")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, base = tmp_path_factory.mktemp("smollm2"), prepare_embedded_model()
    service = Service(folder, base)
    for seed, name in enumerate(TENANTS[1:]):
        tune(base, folder, name, seed)
        service.tenants[name] = Tenant(folder / "deltas" / name)
    return service


@pytest.fixture(scope="module")
def prompts(made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made.base)
    return [tuple(tokenizer(text).input_ids) for text in TEXTS]


@pytest.fixture(scope="module")
def opened(made):
    with opened_store(made, budget=1 << 28) as (overlay, store):
        yield overlay, store


def asked(prompts, tenants=TENANTS, **options):
    return [
        Request(prompt, tenant=name, max_new_tokens=NEW, sampling=Sampling(logprobs=1), ignore_eos=True, **options)
        for prompt in prompts
        for name in tenants
    ]


def entries(answer):
    assert answer.error is None
    return answer.tokens, answer.logprobs


@pytest.mark.skipif(not compiled(), reason="promised by compiled code")
@pytest.mark.parametrize("step", [9, 512])
def test_in_a_mixed_batch_each_answer_has_the_bits_that_it_has_alone(opened, prompts, step):
    overlay, store = opened
    requests = asked(prompts)[::-1][: 9 if step > 9 else 5]
    with engine_of(overlay, store, kv_bytes=1 << 26, max_step_tokens=step) as engine:
        together = engine.generate(requests)
        at_rest(engine, store)
    for request, answer in zip(requests, together, strict=True):
        with engine_of(overlay, store, kv_bytes=1 << 26) as engine:
            (alone,) = engine.generate([request])
        assert entries(alone) == entries(answer)
    assert len({answer.tokens for answer in together[:3]}) == 3


def test_log_probabilities_are_near_those_of_the_merged_model_in_float32(made, opened, prompts):
    """Of prompt tokens: within 0.8 at worst; on average within 0.15 and twice what transformers is off in bfloat16."""
    overlay, store = opened
    with engine_of(overlay, store, kv_bytes=1 << 26) as engine:
        answers = engine.generate(asked(prompts[1:], prompt_logprobs=0))
        at_rest(engine, store)
    found = {name: [a.prompt_logprobs[1:] for a in answers[i :: len(TENANTS)]] for i, name in enumerate(TENANTS)}
    model, rounded = load_model(made.base, torch.float32), load_model(made.base, torch.bfloat16)
    base = torch.cat([logprobs(model, prompt) for prompt in prompts[1:]])
    for name in TENANTS:
        if name is not None:
            with open_checkpoint(made.base) as origin:
                merged = dict(iterate_merged(origin, open_artifact(made.tenants[name].path), torch.float32))
            model.load_state_dict(merged, strict=False)
            rounded.load_state_dict(merged, strict=False)
        expected = torch.cat([logprobs(model, prompt) for prompt in prompts[1:]])
        theirs = torch.cat([logprobs(rounded, prompt) for prompt in prompts[1:]]) - expected
        off = torch.tensor([entry.chosen for entries in found[name] for entry in entries]) - expected
        assert off.abs().max() < 0.8 and off.abs().mean() < min(0.15, 2 * theirs.abs().mean())
        if name is not None:
            assert (expected - base).abs().mean() > 0.2


@torch.inference_mode()
def logprobs(model, prompt):
    """Log-probability of each prompt token but the first, `(tokens - 1,)`."""
    logs = model(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)
    return logs.gather(1, torch.tensor(prompt[1:]).unsqueeze(1)).squeeze(1)
