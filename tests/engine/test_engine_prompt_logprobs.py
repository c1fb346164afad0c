"""Log-probabilities of the end of a prompt: as those of all of it, and what stands before is shared."""

from __future__ import annotations

import pytest
import torch

from deltakeeper.engine import Engine, EngineSettings, Request
from deltakeeper.engine import scheduler as scheduler_module
from deltakeeper.errors import EngineError
from deltakeeper.testing import build_model

PROMPT = tuple(range(3, 55))


def listed(engine, **settings):
    (found,) = engine.generate([Request(PROMPT, max_new_tokens=1, prompt_logprobs=1, **settings)])
    return found.prompt_logprobs


@pytest.fixture(scope="module")
def model():
    return build_model("llama")


@pytest.mark.parametrize(("rows", "step"), [(128, 512), (4, 512), (4, 7)])
@pytest.mark.parametrize("start", [1, 16, 17, 18, 51])
def test_the_end_is_reported_as_with_the_whole(model, rows, start, step, monkeypatch):
    monkeypatch.setattr(scheduler_module, "LOGPROB_ROWS", rows)
    with torch.inference_mode():
        logs = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    with Engine(model, None, settings=EngineSettings(max_step_tokens=step)) as engine:
        engine.generate([Request((*PROMPT[:45], 60, 61), max_new_tokens=1)])
        cold = engine.stats().prefix_hits
        for _ in range(2):
            found = listed(engine, prompt_logprobs_from=start)
            assert found[:start] == (None,) * start
            assert [entry.chosen for entry in found[start:]] == pytest.approx(
                [float(logs[i - 1, PROMPT[i]]) for i in range(start, len(PROMPT))], abs=1e-4
            )
            assert [entry.top[0][0] for entry in found[start:]] == logs[start - 1 : -1].argmax(-1).tolist()
        shared = (start - 1) // 16 * 16  # whole blocks; of the request before, two hold the same tokens
        assert engine.stats().prefix_hits - cold == min(shared, 32) + shared


def test_nothing_is_shared_where_sharing_is_off(model):
    with Engine(model, None, settings=EngineSettings(prefix_sharing=False)) as engine:
        first, second = (listed(engine, prompt_logprobs_from=40) for _ in range(2))
        assert first == second
        assert engine.stats().prefix_hits == 0


@pytest.mark.parametrize("start", [0, len(PROMPT), -1])
def test_a_start_outside_of_the_prompt_is_refused(start):
    with pytest.raises(EngineError, match="prompt_logprobs_from"):
        Request(PROMPT, prompt_logprobs=1, prompt_logprobs_from=start)
