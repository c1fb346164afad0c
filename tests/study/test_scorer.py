"""The engine scores and answers as transformers alone does: base, tenants and what they merge to."""

from __future__ import annotations

import shutil

import pytest
import torch
from toy_chat import write_toy_model

from deltakeeper.apply import apply_delta
from deltakeeper.artifact import open_artifact
from deltakeeper.compress import compress
from deltakeeper.engine import EngineSettings
from deltakeeper.errors import DataError, EngineError, RunError
from deltakeeper.evals.utility import ModelScorer
from deltakeeper.evals.utility.scorer import cut, stop_tokens
from deltakeeper.lab.embedded import load_model
from deltakeeper.study import scorer as scorer_module
from deltakeeper.study.scorer import EngineScorer, scoring

SPECIAL = 6  # tokens of the toy tokenizer that are no words


def change(base, folder, seed):
    """A fine-tune of random changes, written beside the base in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base in float32, two artifacts of it, and what they merge to."""
    folder = tmp_path_factory.mktemp("made")
    base = write_toy_model(folder / "base")
    model, tokenizer = load_model(base, torch.float32)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    for seed, (name, codec) in enumerate((("signs", "bitdelta"), ("ranks", "svd:rank=4"))):
        compress(base, change(base, folder / f"tuned-{name}", seed), folder / name, codec)
        apply_delta(base, folder / name, folder / "merged" / name)
    return folder


@pytest.fixture(scope="module")
def loaded(made):
    return load_model(made / "base", torch.float32)


def artifacts(made, *names):
    return {name: open_artifact(made / name) for name in names}


def merged(made, name):
    return load_model(made / "merged" / name, torch.float32)[0]


def questions(tokenizer, count=12):
    """Pairs of all kinds: long and short, one token after a shared context, and texts that repeat."""
    generator = torch.Generator().manual_seed(1)

    def draw(most):
        size = int(torch.randint(1, most + 1, (1,), generator=generator))
        return tuple(torch.randint(SPECIAL, len(tokenizer), (size,), generator=generator).tolist())

    pairs = [(draw(40), draw(20)) for _ in range(count)]
    letters = [(pairs[0][0], (token,)) for token in (7, 8, 9, 10)]
    return [*pairs, *letters, pairs[1], (draw(1), draw(1))]


def test_scores_equal_transformers_on_base_and_merged_models(made, loaded):
    model, tokenizer = loaded
    pairs = questions(tokenizer)
    with scoring(model, tokenizer, artifacts(made, "signs", "ranks")) as (scorer,):
        assert scorer.arms == ("base", "signs", "ranks")
        ours = scorer.loglikelihoods(pairs)
    alone = {"base": model, "signs": merged(made, "signs"), "ranks": merged(made, "ranks")}
    for arm, name in enumerate(scorer.arms):
        theirs = ModelScorer(alone[name], tokenizer, batch_size=5).loglikelihoods(pairs)
        assert [row[arm].logprob for row in ours] == pytest.approx([row[0].logprob for row in theirs], rel=1e-4)
        assert [row[arm].greedy for row in ours] == [row[0].greedy for row in theirs]
    assert len({tuple(row[arm].logprob for row in ours) for arm in range(3)}) == 3


def test_what_the_model_would_say_is_greedy(loaded):
    model, tokenizer = loaded
    context = (7, 8, 9)
    ids = torch.tensor([context])
    with torch.inference_mode():
        for _ in range(4):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    said = tuple(ids[0, 3:].tolist())
    other = (*said[:-1], (said[-1] + 1) % len(tokenizer))
    with scoring(model, tokenizer, {}) as (scorer,):
        found = scorer.loglikelihoods([(context, said), (context, other), (context, said[:1]), (context, other[:1])])
    assert [row[0].greedy for row in found] == [True, False, True, True]
    assert [
        row[0].greedy for row in ModelScorer(model, tokenizer).loglikelihoods([(context, said), (context, other)])
    ] == [True, False]


def test_letters_after_one_context_are_computed_once(loaded, monkeypatch):
    model, tokenizer = loaded
    context = tuple(range(10, 90))
    pairs = [(context, (token,)) for token in (7, 8, 9, 11)]
    with scoring(model, tokenizer, {}) as (scorer,):
        short = scorer.loglikelihoods(pairs)
        first = scorer.engine.stats().prompt_tokens
        monkeypatch.setattr(scorer_module, "_LISTED", 1)  # so that most letters are not among the likeliest
        long = scorer.loglikelihoods(pairs)
        assert scorer.engine.stats().prompt_tokens - first > 3 * len(context)
    assert first <= len(context) + 4 * (len(context) + 1)
    assert [row[0].logprob for row in short] == pytest.approx([row[0].logprob for row in long], rel=1e-5)


def test_a_listed_letter_costs_no_further_request(loaded, monkeypatch):
    model, tokenizer = loaded
    context = tuple(range(10, 90))
    with torch.inference_mode():
        likely = model(torch.tensor([context])).logits[0, -1].topk(4).indices.tolist()
    with scoring(model, tokenizer, {}) as (scorer,):
        found = scorer.loglikelihoods([(context, (token,)) for token in likely])
        assert scorer.engine.stats().prompt_tokens == len(context)
    assert [row[0].greedy for row in found] == [True, False, False, False]


def test_answers_equal_transformers_and_end_at_stops(made, loaded):
    model, tokenizer = loaded
    prompts = [pair[0] for pair in questions(tokenizer, 6)]
    with scoring(model, tokenizer, artifacts(made, "signs")) as (scorer,):
        ours = scorer.generate(prompts, (), 12)
        stop = ours[0][0].split()[3]
        cut_ = scorer.generate(prompts, (stop, "<unk>"), 12)
    for arm, alone in enumerate((model, merged(made, "signs"))):
        theirs = ModelScorer(alone, tokenizer)
        assert [row[arm] for row in ours] == [row[0] for row in theirs.generate(prompts, (), 12)]
        assert [row[arm] for row in cut_] == [row[0] for row in theirs.generate(prompts, (stop, "<unk>"), 12)]
        assert all(stop not in row[arm] for row in cut_)
    assert cut_[0][0] == ours[0][0][: ours[0][0].index(stop)]
    assert [row[0] for row in ours] != [row[1] for row in ours]


def test_progress_is_told_to_the_end(loaded):
    model, tokenizer = loaded
    pairs, told = questions(tokenizer, 3), []
    with scoring(model, tokenizer, {}) as (scorer,):
        scorer.loglikelihoods(pairs, lambda *at: told.append(at))
        scorer.generate([(7, 8)], (), 2, lambda *at: told.append(at))
    assert told[-2:] == [(len(pairs), len(pairs)), (1, 1)]
    theirs = []
    ModelScorer(model, tokenizer).loglikelihoods(pairs, lambda *at: theirs.append(at))
    ModelScorer(model, tokenizer).generate([(7, 8)], (), 2, lambda *at: theirs.append(at))
    assert theirs[-2:] == told[-2:]


def test_more_requests_than_are_handed_in_together_keep_their_order(loaded, monkeypatch):
    model, tokenizer = loaded
    pairs = questions(tokenizer)
    with scoring(model, tokenizer, {}) as (scorer,):
        whole = scorer.loglikelihoods(pairs)
        monkeypatch.setattr(scorer_module, "_TOGETHER", 3)
        assert [r[0].logprob for r in scorer.loglikelihoods(pairs)] == pytest.approx([r[0].logprob for r in whole])


def test_a_tenant_with_words_of_its_own_is_a_scorer_of_its_own(made, loaded, tmp_path):
    model, tokenizer = loaded
    own = tmp_path / "own"
    shutil.copytree(made / "tuned-signs", own)
    (own / "chat_template.jinja").write_text("{% for m in messages %}<user> {{ m['content'] }} {% endfor %}")
    compress(made / "base", own, tmp_path / "other", "bitdelta")
    given = artifacts(made, "signs") | {"other": open_artifact(tmp_path / "other")}
    with scoring(model, tokenizer, given, base=False) as scorers:
        assert [scorer.arms for scorer in scorers] == [("signs",), ("other",)]
        assert scorers[0].tokenizer is tokenizer or scorers[0].tokenizer.chat_template == tokenizer.chat_template
        assert scorers[1].tokenizer.chat_template != tokenizer.chat_template
    with pytest.raises(DataError, match="called 'base'"), scoring(model, tokenizer, {"base": given["signs"]}):
        pass


def test_the_model_is_as_before_and_what_cannot_be_scored_is_told(loaded):
    model, tokenizer = loaded
    with scoring(model, tokenizer, {}, settings=EngineSettings(max_context=16)) as (scorer,):
        assert scorer.context == 15
        scorer.loglikelihoods([(tuple(range(6, 20)), (7,))])
        with pytest.raises(EngineError, match="shorten the prompt"):
            scorer.loglikelihoods([(tuple(range(6, 20)), (7, 8))])
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[1] == 3
    broken, _ = load_model(model.name_or_path, torch.float32)
    with scoring(broken, tokenizer, {}) as (scorer,):
        with torch.no_grad():
            broken.lm_head.weight[:] = float("nan")
        with pytest.raises(RunError, match=r"not answered by base: .*not numbers"):
            scorer.loglikelihoods([((7,), (8,))])
    assert isinstance(scorer, EngineScorer)


def test_texts_are_cut_at_the_first_stop(loaded):
    _, tokenizer = loaded
    assert cut("one two three", ("three", "two")) == "one "
    assert cut("one", ()) == "one"
    assert stop_tokens(tokenizer, ("<unk>", "word")) == {
        tokenizer.eos_token_id,
        tokenizer.convert_tokens_to_ids("<unk>"),
    }
