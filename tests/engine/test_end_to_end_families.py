"""Every architecture end to end, and every instruction set: base and tenants in one batch are their merged models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from end_to_end_cases import at_rest, engine_of, opened_store, same_until_a_tie, service_of
from engine_cases import prompts_of

from deltakeeper.engine import Request, Sampling
from deltakeeper.testing.models import KINDS

NEW = 8
TENANTS = (None, "signs", "factors")
KERNELS = ("avx512bf16", "avx512", "avx2", "scalar", "torch")


def tenants_of(kind, folder):
    service = service_of(kind, folder)
    service.tune("signs", "bitdelta:bits=2", seed=1)
    service.tune("factors", "svd:rank=4", seed=2)
    return service


def requests():
    """Windows of the tiny models are 6 and 8 tokens, shorter than these prompts."""
    return [
        Request(prompt, tenant=tenant, max_new_tokens=NEW, sampling=Sampling(logprobs=0))
        for prompt in prompts_of(20, 37, 5, seed=4)
        for tenant in TENANTS
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_base_and_tenants_in_one_batch_are_their_merged_models(kind, tmp_path):
    service = tenants_of(kind, tmp_path)
    asked = requests()
    with opened_store(service) as (overlay, store), engine_of(overlay, store, max_step_tokens=50) as engine:
        answers = engine.generate(asked)
        at_rest(engine, store)
    assert [answer.error for answer in answers] == [None] * len(asked)
    compared = 0
    for request, answer in zip(asked, answers, strict=True):
        expected = service.merged_answer(request.tenant, request.prompt, NEW)
        same = same_until_a_tie(list(answer.tokens), expected)
        found = [entry.chosen for entry in answer.logprobs[:same]]
        assert found == pytest.approx(expected[2][:same], abs=2e-4)
        compared += same
    assert compared >= 0.6 * sum(len(answer.tokens) for answer in answers)
    base, *others = ([entry.chosen for entry in answer.logprobs] for answer in answers[3:6])
    for other in others:
        assert max(abs(a - b) for a, b in zip(base, other, strict=False)) > 0.01


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    service = tenants_of("llama", tmp_path_factory.mktemp("llama"))
    service.tune("planes", "bitdelta:bits=3", seed=5)
    service.tune("codes", "rtn:bits=4", seed=6)
    return service


_CHILD = """
import json, os, sys, traceback
from pathlib import Path
import transformers.masking_utils, transformers.generation, transformers.models.llama.modeling_llama

def serve():
    from end_to_end_cases import Service, Tenant, engine_of, opened_store
    from deltakeeper.engine import Request
    from deltakeeper.kernels.library import backend

    service = Service(folder, folder / "base", {p.name: Tenant(p) for p in (folder / "deltas").iterdir()})
    with opened_store(service) as (overlay, store), engine_of(overlay, store, max_step_tokens=24) as engine:
        answers = engine.generate([Request(prompt, tenant=name, max_new_tokens=8) for name, prompt in asked])
    return {"used": backend().isa or backend().name, "answers": [[a.error, a.tokens] for a in answers]}

folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
for kernels in sys.argv[3:]:
    if os.fork() == 0:
        os.environ["DELTAKEEPER_KERNELS"] = kernels
        try:
            found = serve()
        except BaseException:
            found = {"failed": traceback.format_exc()}
        (folder / f"{kernels}.json").write_text(json.dumps(found))
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def by_kernels(llama):
    """What a process for each instruction set answers; they are forked before anything of ours is imported."""
    asked = [(name, prompt) for prompt in prompts_of(20, 37, seed=4) for name in (None, *llama.tenants)]
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, str(llama.folder), json.dumps(asked), *KERNELS]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return asked, {name: json.loads((llama.folder / f"{name}.json").read_text()) for name in KERNELS}


@pytest.mark.parametrize("kernels", KERNELS)
def test_every_instruction_set_gives_the_same_tokens(kernels, llama, by_kernels):
    asked, found = by_kernels
    failed = found[kernels].get("failed", "")
    if "this CPU does not have it" in failed or "they were not built" in failed:
        pytest.skip(f"{kernels} cannot run here")
    assert not failed, failed
    assert found[kernels]["used"] == kernels
    compared = 0
    for (name, prompt), (error, tokens) in zip(asked, found[kernels]["answers"], strict=True):
        assert error is None
        compared += same_until_a_tie(tokens, llama.merged_answer(name, prompt, NEW))
    assert compared >= 0.6 * NEW * len(asked)
