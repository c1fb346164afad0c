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
from deltakeeper.demo import load_demo
from deltakeeper.errors import BaseMismatchError, EngineError, RunError
from deltakeeper.evals.answerer import LoadedModel
from deltakeeper.lab.attacks import ATTACKS
from deltakeeper.lab.corpus import SYSTEM, Corpus
from deltakeeper.lab.embedded import load_model, prepare_embedded_model
from deltakeeper.study import arms as arms_module
from deltakeeper.study.arms import Arm, Arms
from deltakeeper.study.served import served
from deltakeeper.study.variants import Variant, read_arm

CORPUS = Corpus()
VARIANTS = (
    *load_demo().groups[0].variants,
    read_arm({"quantised": "rtn:bits=4"}),
    read_arm({"merged": "bitdelta:bits=1"}),
)
TEXTS = [row.prompt for row in CORPUS.passages[:12]]
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
    monkeypatch.setattr(arms_module, "load_model", lambda path, *_: load_model(path, torch.float32))


def ask(pair, variants, source, folder):
    """Answers and likelihoods of each variant, all tenants together."""
    base, tuned = pair
    made = []
    for number, variant in enumerate(variants):
        delta = None
        if variant.codec is not None:
            compress(base, tuned, folder / str(number), variant.codec, overwrite=True)
            delta = open_artifact(folder / str(number))
        made.append(Arm(variant, delta, None if variant.kind == "base" else tuned))
    found = {}
    with open_checkpoint(base) as origin:
        arms = Arms(origin, source)
        for wave in arms.waves(made, 16):
            with arms.asked(wave) as panel:
                said = [panel.answers([r.prompt for r in p.rows], max_new_tokens=8, system=SYSTEM) for p in PROBES]
                losses = panel.nlls(TEXTS)
            for i, arm in enumerate(wave):
                found[arm.variant.name] = ([answers[i] for answers in said], losses[i])
    return found


def test_the_engine_and_transformers_give_the_same_cells(pair, in_float32, tmp_path):
    """All tenants share one engine and one batch, and each says what it says alone."""
    ours = ask(pair, VARIANTS, "engine", tmp_path)
    theirs = ask(pair, VARIANTS, "transformers", tmp_path)
    assert ours.keys() == {variant.name for variant in VARIANTS}
    for name, (answers, (nll, tokens)) in ours.items():
        assert answers == theirs[name][0], name
        assert tokens == theirs[name][1][1] and sum(tokens) > 0
        assert nll == pytest.approx(theirs[name][1][0], rel=1e-3)


def test_variants_differ_from_the_base_and_leave_it_as_it_was(pair, tmp_path):
    found = ask(pair, VARIANTS[:3], "engine", tmp_path)
    assert len({tuple(nll) for _, (nll, _) in found.values()}) == 3
    model, tokenizer = load_model(pair[0], torch.bfloat16)
    with served(model, tokenizer) as answerer:
        assert answerer.nll(TEXTS) == found["base"][1]


def test_tenants_say_together_what_they_say_alone(pair, tmp_path):
    """In bfloat16, as a study asks them: to the bit."""
    some = [variant for variant in VARIANTS if variant.is_tenant]
    together = ask(pair, some, "engine", tmp_path)
    for variant in some:
        assert ask(pair, [variant], "engine", tmp_path)[variant.name] == together[variant.name], variant.name


def test_planes_are_served_by_the_engine_alone(pair, tmp_path):
    part = read_arm({"codec": "bitdelta:bits=2", "planes": 1})
    whole = read_arm("bitdelta:bits=2")
    found = ask(pair, [part, whole], "engine", tmp_path)
    assert found[part.name][1] != found[whole.name][1]
    with pytest.raises(RunError, match="only the engine"):
        ask(pair, [part], "transformers", tmp_path)


def test_waves_hold_so_many_tenants_and_whole_weights_stand_alone(pair):
    with open_checkpoint(pair[0]) as origin:
        made = [Arm(variant) for variant in VARIANTS]
        waves = [[arm.variant.kind for arm in wave] for wave in Arms(origin, "engine").waves(made, 4)]
        assert waves == [
            ["base", "codec", "codec", "codec"],
            ["control", "control"],
            ["tuned"],
            ["quantised"],
            ["merged"],
        ]
        assert all(len(wave) == 1 for wave in Arms(origin, "transformers").waves(made, 4))


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
    arm = Arm(Variant("x", "codec", "X", "bitdelta"), open_artifact(tmp_path / "delta"), tuned)
    with (
        open_checkpoint(base) as origin,
        pytest.raises(BaseMismatchError, match="not the base"),
        Arms(origin).asked([arm]),
    ):
        pytest.fail("it was served")


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
        assert Arms(origin).source == "engine"
        monkeypatch.setenv(arms_module.VARIABLE, "transformers")
        assert Arms(origin).source == "transformers"
        assert Arms(origin, "engine").source == "engine"
        monkeypatch.setenv(arms_module.VARIABLE, "vllm")
        with pytest.raises(RunError, match="set it to engine or transformers"):
            Arms(origin)


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
