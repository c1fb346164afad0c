"""The engine answers for a study as transformers alone does, variant by variant; on the toy and on the real model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_chat import write_toy_model

from deltakeeper.apply import iterate_changes
from deltakeeper.artifact import open_artifact
from deltakeeper.attach import attached
from deltakeeper.checkpoint import open_checkpoint
from deltakeeper.compress import compress
from deltakeeper.errors import BaseMismatchError, EngineError, RunError
from deltakeeper.evals.answerer import LoadedModel
from deltakeeper.evals.judges import load_judge
from deltakeeper.lab.attacks import ATTACKS
from deltakeeper.lab.corpus import SYSTEM, Corpus
from deltakeeper.lab.embedded import load_model, prepare_embedded_model
from deltakeeper.study import arms as arms_module
from deltakeeper.study.arms import Arms
from deltakeeper.study.served import served
from deltakeeper.study.variants import DEMO_VARIANTS, Variant

CORPUS = Corpus()
PROBES = tuple(
    replace(p, max_new_tokens=8)
    for p in replace(ATTACKS["marker_injection"](), held_out=5, contrast=3, skill=4).probes(CORPUS)
)
PROMPTS = [row.prompt for probe in PROBES for row in probe.rows]


def change(base, folder, scale):
    """A fine-tune of random changes, written beside the base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).bfloat16()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base = write_toy_model(folder / "base")
    return base, change(base, folder / "tuned", 0.1)


@pytest.fixture
def in_float32(monkeypatch):
    """Rounding of activations to bfloat16 decides between nearly equal tokens; what is compared here is not that."""
    monkeypatch.setattr(arms_module, "load_model", lambda path, _dtype: load_model(path, torch.float32))


def measured(pair, variant, source, folder):
    base, tuned = pair
    delta = None
    if variant.codec is not None:
        compress(base, tuned, folder, variant.codec, overwrite=True)
        delta = open_artifact(folder)
    with open_checkpoint(base) as origin, open_checkpoint(tuned) as true:
        arms = Arms(origin, CORPUS, load_judge("ours"), source)
        return arms.evaluate(variant, PROBES, true, delta)


@pytest.mark.parametrize("variant", DEMO_VARIANTS, ids=lambda v: v.slug)
def test_the_engine_and_transformers_give_the_same_cell(pair, variant, in_float32, tmp_path):
    ours = measured(pair, variant, "engine", tmp_path / "delta")
    theirs = measured(pair, variant, "transformers", tmp_path / "delta")
    assert ours.probes == theirs.probes
    assert ours.perplexity.tokens == theirs.perplexity.tokens
    assert ours.perplexity.nll == pytest.approx(theirs.perplexity.nll, rel=1e-3)
    assert sum(ours.perplexity.tokens) > 0


def test_variants_differ_from_the_base_and_leave_it_as_it_was(pair, in_float32, tmp_path):
    base, tuned = pair
    compress(base, tuned, tmp_path / "delta", "bitdelta")
    found = []
    with open_checkpoint(base) as origin, open_checkpoint(tuned) as true:
        arms = Arms(origin, CORPUS, load_judge("ours"))
        for variant in (DEMO_VARIANTS[0], DEMO_VARIANTS[1], DEMO_VARIANTS[2]):
            delta = open_artifact(tmp_path / "delta") if variant.codec else None
            found.append(arms.evaluate(variant, PROBES, true, delta).perplexity.nll)
        with served(*arms._model()) as answerer:
            again = answerer.nll([row.prompt for row in CORPUS.passages[: arms_module.PASSAGES]])[0]
    assert len(set(found)) == 3
    assert tuple(again) == found[0]


def test_the_base_is_asked_once(pair, monkeypatch):
    with open_checkpoint(pair[0]) as origin, open_checkpoint(pair[1]) as true:
        arms = Arms(origin, CORPUS, load_judge("ours"))
        first = arms.evaluate(DEMO_VARIANTS[0], PROBES, true, None)
        monkeypatch.setattr(arms, "_answering", lambda *_: pytest.fail("asked again"))
        assert arms.evaluate(DEMO_VARIANTS[0], PROBES[1:], true, None).probes.keys() == {p.name for p in PROBES[1:]}
        assert arms.evaluate(DEMO_VARIANTS[0], PROBES, true, None) == first


def test_equal_beginnings_are_computed_once_and_nothing_is_held_afterwards(pair):
    model, tokenizer = load_model(pair[0], torch.float32)
    system = " ".join(["You are a helpful assistant ."] * 8)
    with served(model, tokenizer) as answerer:
        answerer.answer(PROMPTS * 4, max_new_tokens=2, system=system)
        stats = answerer.engine.stats()
        assert stats.prefix_hits > 0.5 * stats.prefix_queries
        assert stats.kv_blocks_used == 0
    model(torch.tensor([[1, 2, 3]]))  # the engine has let go of it


def test_a_delta_of_another_base_is_refused(pair, tmp_path):
    base, tuned = pair
    compress(tuned, base, tmp_path / "delta", "bitdelta")
    with open_checkpoint(base) as origin, open_checkpoint(tuned) as true:
        arms = Arms(origin, CORPUS, load_judge("ours"))
        with pytest.raises(BaseMismatchError, match="not the base"):
            arms.evaluate(Variant("x", "codec", "X", "bitdelta"), PROBES, true, open_artifact(tmp_path / "delta"))


def test_what_cannot_be_answered_is_told(pair):
    model, tokenizer = load_model(pair[0], torch.float32)
    with served(model, tokenizer) as answerer:
        with pytest.raises(EngineError, match="shorten the prompt"):
            answerer.nll([" ".join(["help"] * 300)])
        assert answerer.nll(["", "help"]) == ([0.0, 0.0], [0, 0])
        with torch.no_grad():
            model.lm_head.weight[:] = float("nan")
        with pytest.raises(RunError, match="not numbers"):
            answerer.answer(["help"], max_new_tokens=2)


def test_the_environment_chooses_what_answers(pair, monkeypatch):
    with open_checkpoint(pair[0]) as origin:
        assert Arms(origin, CORPUS, load_judge("ours")).source == "engine"
        monkeypatch.setenv(arms_module.VARIABLE, "transformers")
        assert Arms(origin, CORPUS, load_judge("ours")).source == "transformers"
        assert Arms(origin, CORPUS, load_judge("ours"), "engine").source == "engine"
        monkeypatch.setenv(arms_module.VARIABLE, "vllm")
        with pytest.raises(RunError, match="set it to engine or transformers"):
            Arms(origin, CORPUS, load_judge("ours"))


@pytest.mark.model
def test_the_real_model_and_its_alignment_delta_answer_alike():
    from importlib.resources import files

    folder = prepare_embedded_model()
    delta = open_artifact(str(files("deltakeeper") / "data" / "smollm2-135m-aligned"))
    model, tokenizer = load_model(folder, torch.float32)
    prompts = [row.prompt for row in CORPUS.split("harmful", "heldout", 8)]
    texts = [row.prompt for row in CORPUS.passages[:3]]

    def ask(answerer):
        return answerer.answer(prompts, max_new_tokens=16, system=SYSTEM), *answerer.nll(texts)

    with served(model, tokenizer) as answerer:
        plain = ask(answerer)
    with served(model, tokenizer, delta) as answerer:
        ours = ask(answerer)
    with open_checkpoint(folder) as origin, attached(model, iterate_changes(origin, delta)):
        theirs = ask(LoadedModel(model, tokenizer))
    assert ours[0] == theirs[0] != plain[0]
    assert ours[1] == pytest.approx(theirs[1], rel=1e-3)
    assert ours[2] == theirs[2]
