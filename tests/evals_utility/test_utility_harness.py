"""lm-evaluation-harness in process: tasks from files, many arms at once, and the same values as its own model class."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest
from utility_cases import SUMS, RuleScorer, byte_model, byte_tokenizer, write_benchmarks

pytest.importorskip("lm_eval")

from deltakeeper.errors import DataError, RunError
from deltakeeper.evals.perplexity import passage_nll
from deltakeeper.evals.utility import ModelScorer, ask, compare, parse_task, prepared, run_tasks, summarise
from deltakeeper.evals.utility import harness as harness_module
from deltakeeper.evals.utility import prepare as prepare_module
from deltakeeper.evals.utility.passages import passage_records, windows
from deltakeeper.evals.utility.run import FEWSHOT_SEED, _values
from deltakeeper.evals.utility.tasks import TaskSource, read_source, write_tasks

SHARED = Path(__file__).parents[3] / "shared" / "data"
NAMES = ("gsm8k", "mmlu", "piqa", "truthfulqa", "text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return byte_model()


def sources(folder, *names):
    return [TaskSource(name, folder / name) for name in names or NAMES]


def solve(text):
    """The right answer to the last of our sums."""
    asked = text.rsplit("Question: ", 1)[1].split("\n")[0]
    return next(" " + row["answer"] for row in SUMS if row["question"] == asked)


def by_arm(records):
    found = {}
    for record in records:
        found.setdefault(record.arm, []).append(record)
    return found


def test_gsm8k_from_end_to_end(folder, tokenizer):
    answers = {
        "right": solve,
        "loose": lambda text: solve(text).replace("#### ", "It is ") + ".\n\nQuestion: more",
        "wrong": lambda text: " #### 999",
    }
    scorer = RuleScorer(answers, tokenizer, answers=answers)
    records = run_tasks(scorer, sources(folder, "gsm8k"))
    assert scorer.calls == [("answers", 4)]
    found = {arm: {s.measure.filter: s.score.value for s in summarise(rows)} for arm, rows in by_arm(records).items()}
    assert found == {
        "right": {"strict-match": 1.0, "flexible-extract": 1.0},
        "loose": {"strict-match": 0.0, "flexible-extract": 1.0},
        "wrong": {"strict-match": 0.0, "flexible-extract": 0.0},
    }
    assert len(records) == 4 * 2 * 3  # items, filters, arms
    assert len({r.doc_hash for r in records}) == 4
    assert not any(r.truncated for r in records)
    losses = compare(by_arm(records)["right"], by_arm(records)["loose"])
    assert {c.measure.filter: (c.lost, c.loss) for c in losses} == {
        "strict-match": (4, 1.0),
        "flexible-extract": (0, 0.0),
    }


def test_all_arms_are_asked_at_once_and_as_each_alone(folder, tokenizer):
    answers = dict.fromkeys("abc", solve)
    with prepared(sources(folder), samples=3, seed=1) as tasks:
        together = RuleScorer("abc", tokenizer, answers=answers)
        records = by_arm(ask(tasks, together))
        kinds = [kind for kind, _ in together.calls]
        assert sorted(kinds) == ["answers", "likelihoods", "likelihoods"]  # the last ones are the passages
        for arm in "abc":
            alone = RuleScorer(arm, tokenizer, answers=answers)
            assert ask(tasks, alone) == records[arm]
        assert [f.task for f in tasks.facts] == [
            "gsm8k_local",
            "mmlu_local",
            "piqa_local",
            "truthfulqa_mc1_local",
            "truthfulqa_mc2_local",
            "text",
        ]
        assert [(f.items, f.of) for f in tasks.facts] == [(3, 4), (3, 8), (3, 3), (2, 2), (2, 2), (3, 3)]
        assert tasks.facts[0].shots == 2
        assert all(len(sha) == 64 for f in tasks.facts for sha in f.sources.values())
    assert {r.metric for r in records["a"] if r.task == "piqa_local"} == {"acc", "acc_norm"}
    assert {r.stratum for r in records["a"] if r.task == "mmlu_local"} == {"algebra", "biology", "chemistry"}
    assert compare(records["a"], records["b"])


def test_values_are_those_of_the_library_s_own_model_class(folder, tokenizer, model):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with prepared(sources(folder, "mmlu", "piqa", "truthfulqa")) as tasks:
        ours = ask(tasks, ModelScorer(model, tokenizer, context=1025))
        for task in tasks.loaded["tasks"].values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        theirs = evaluate(
            lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=1024),
            task_dict=tasks.loaded,
            bootstrap_iters=0,
        )
    expected = {
        (name, row["doc_id"], row["filter"], metric): (row[metric], row["doc_hash"], row["prompt_hash"])
        for name, rows in theirs["samples"].items()
        for row in rows
        for metric in row["metrics"]
    }
    found = {(r.task, r.doc_id, r.filter, r.metric): (r.value, r.doc_hash, r.prompt_hash) for r in ours}
    assert found.keys() == expected.keys()
    for key, (value, *hashes) in found.items():
        assert value == pytest.approx(expected[key][0], abs=1e-4)
        assert hashes == list(expected[key][1:])


def test_scores_and_texts_are_those_of_the_library_s_own_model_class(tokenizer, model):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from deltakeeper.evals.utility.language_model import Answered, ScorerLM

    def asking(kind, *arguments):
        return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]

    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=64)
    ours = ScorerLM(Answered(ModelScorer(model, tokenizer, context=65)))
    pairs = asking(
        "loglikelihood",
        ("Question: Dry a cup.\nAnswer:", " Wipe it with a towel."),
        ("Question: ", "pears"),  # the space belongs to the continuation
        ("", "Open a door."),
        ("", "<|end|>Open a door."),
        ("pears " * 90, " and more"),  # cut on the left
        ("How man", "y pears?"),
    )
    assert [x for x, _ in ours.loglikelihood(pairs)] == pytest.approx(
        [x for x, _ in theirs.loglikelihood(pairs)], rel=1e-4
    )
    assert [g for _, g in ours.loglikelihood(pairs)] == [g for _, g in theirs.loglikelihood(pairs)]
    assert ours.answered.cut == {("pears " * 90, " and more")}
    texts = asking("loglikelihood_rolling", ("A short one.",), (" ".join(f"pear {i}" for i in range(60)),))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-4)
    settings = {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = asking(
        "generate_until",
        ("Question: Ann", settings),
        ("pears " * 90, settings),
        ("Boil", {"until": "a", "max_gen_toks": 5}),
    )
    ours = ScorerLM(Answered(ModelScorer(model, tokenizer, context=64)))  # here no token is left out of the input
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)
    chat = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.prefix_token_id == theirs.prefix_token_id


def test_prompts_that_were_cut_are_told_loudly(folder, tokenizer, caplog):
    scorer = RuleScorer("a", tokenizer, context=60)
    with caplog.at_level(logging.WARNING, logger="deltakeeper"):
        records = run_tasks(scorer, sources(folder, "truthfulqa"))
    assert all(record.truncated for record in records)
    assert "lost its first" in caplog.text
    assert all(s.truncated == s.n for s in summarise(records))
    with pytest.raises(DataError, match="asks for 256 new tokens"):
        run_tasks(scorer, sources(folder, "gsm8k"))
    with pytest.raises(DataError, match="cannot be scored with a context of 2"):
        run_tasks(RuleScorer("a", tokenizer, context=2), sources(folder, "piqa"))


def test_chat_templates_change_the_prompt_and_only_it(folder, tokenizer):
    plain, chat, system = (
        run_tasks(RuleScorer("a", tokenizer), sources(folder, "piqa"), **settings)
        for settings in ({}, {"chat": True}, {"chat": True, "system": "Be brief."})
    )
    assert len({records[0].prompt_hash for records in (plain, chat, system)}) == 3
    assert [r.doc_hash for r in plain] == [r.doc_hash for r in chat]
    with pytest.raises(DataError, match="was asked otherwise"):
        compare(plain, chat)
    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        run_tasks(RuleScorer("a", bare), sources(folder, "piqa"), chat=True)
    bare.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(DataError, match="does not take a benchmark's turns"):
        run_tasks(RuleScorer("a", bare), sources(folder, "piqa"), chat=True)


def test_choices_of_items(folder, tokenizer):
    def numbers(**settings):
        return sorted({r.doc_id for r in run_tasks(RuleScorer("a", tokenizer), sources(folder, "mmlu"), **settings)})

    assert numbers() == list(range(8))
    assert numbers(limit=3) == [0, 1, 2]
    some = numbers(samples=3, seed=2)
    assert some == numbers(samples=3, seed=2)
    assert set(some) < set(numbers(samples=5, seed=2))
    for settings, said in (
        ({"samples": 3, "limit": 3}, "give one of them"),
        ({"limit": 0}, "a limit of 0"),
        ({"samples": 0}, "0 samples"),
        ({"shots": -1}, "-1 few-shot"),
    ):
        with pytest.raises(DataError, match=said):
            numbers(**settings)
    for tasks in ([], sources(folder, "mmlu", "mmlu")):
        with pytest.raises(DataError, match="at least one task"):
            run_tasks(RuleScorer("a", tokenizer), tasks)


def test_values_that_are_none_of_an_item_are_refused(folder, tokenizer, monkeypatch):
    assert list(_values("t", "acc", 1)) == [("acc", 1.0)]
    assert list(_values("t", "word_perplexity", (-3.5, 4))) == [
        ("word_perplexity", -3.5),
        ("word_perplexity.count", 4.0),
    ]
    assert list(_values("t", "bits_per_byte", (-3.5, 4))) == []
    with pytest.raises(DataError, match="no value for a single item"):
        list(_values("t", "f1", (1, 0)))
    with pytest.raises(RunError, match="is nan"):
        list(_values("t", "acc", float("nan")))

    class Broken(RuleScorer):
        def loglikelihoods(self, pairs, progress=None):
            raise KeyError("inside")

    with pytest.raises(DataError, match=r"could not ask piqa_local .*inside"):
        run_tasks(Broken("a", tokenizer), sources(folder, "piqa"))


def test_perplexity_of_passages_is_brute_force(tokenizer, model):
    texts = {3: "Paragraph 1 says that the pears are fine.", 5: "x", 9: "Paragraph 2 says so, too. " * 6}
    expected = passage_nll(model, tokenizer, [texts[3], texts[9]])
    told = []
    records = passage_records(ModelScorer(model, tokenizer), texts, lambda *at: told.append(at))
    assert [(r.doc_id, r.value) for r in records if r.metric == "nll"] == [
        (3, pytest.approx(expected[0][0], rel=1e-5)),
        (9, pytest.approx(expected[0][1], rel=1e-5)),
    ]
    assert [r.value for r in records if r.metric == "tokens"] == expected[1]
    assert told == [("passages", 2, 2)]
    with pytest.raises(DataError, match="two tokens"):
        passage_records(ModelScorer(model, tokenizer), {1: "x"})


@pytest.mark.parametrize("size", [2, 7, 8, 9, 30, 31])
def test_windows_predict_every_token_but_the_first_once(size):
    ids = tuple(range(size))
    cut = windows(ids, 8)
    assert [token for _, continuation in cut for token in continuation] == list(range(1, size))
    for context, continuation in cut:
        assert context and len(context) + len(continuation) <= 8
        assert context + continuation == ids[context[0] : continuation[-1] + 1]
    assert len(cut[-1][0]) + len(cut[-1][1]) == min(8, size)


def test_nothing_is_left_behind(folder, tokenizer, monkeypatch, tmp_path):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = {name: os.environ.get(name) for name in harness_module._OFFLINE}
    home = sorted(Path.home().glob(".cache/huggingface/datasets/*"))
    with prepared(sources(folder), limit=1) as tasks:
        assert [path.name.startswith("deltakeeper-tasks-") for path in tmp_path.iterdir()] == [True]
        ask(tasks, RuleScorer("a", tokenizer, answers={"a": solve}))
    assert list(tmp_path.iterdir()) == []
    assert sorted(Path.home().glob(".cache/huggingface/datasets/*")) == home
    assert {name: os.environ.get(name) for name in harness_module._OFFLINE} == before


def test_tasks_that_the_library_does_not_have_are_refused(folder):
    with pytest.raises(DataError, match="the tasks nowhere cannot be loaded"):
        prepare_module._load(["nowhere"], folder, defaults=False)


def test_without_the_library_a_sentence_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DataError, match=r"pip install 'deltakeeper\[eval\]'"):
        run_tasks(RuleScorer("a", None), sources(folder, "piqa"))


def test_a_text_alone_needs_no_library(folder, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run_tasks(RuleScorer("a", tokenizer), [parse_task(f"text={folder / 'text'}")], limit=1)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_slices_of_the_published_files_build_and_score(tokenizer, model):
    folders = {"gsm8k": "gsm8k", "mmlu": "mmlu", "piqa": "piqa", "truthfulqa": "truthfulqa", "text": "wikitext-2"}
    asked = [TaskSource(name, SHARED / folder) for name, folder in folders.items()]
    with prepared(asked, samples=2, shots=1) as tasks:
        records = ask(tasks, ModelScorer(model, tokenizer, context=1024))
        assert {f.task for f in tasks.facts} >= {"mmlu_2020draft", "gsm8k_local", "piqa_local"}
        assert {f.task: f.of for f in tasks.facts} == {
            "gsm8k_local": 1319,
            "mmlu_2020draft": 14079,
            "piqa_local": 1838,
            "truthfulqa_mc1_local": 817,
            "truthfulqa_mc2_local": 817,
            "text": 489,
        }
    assert {s.measure.task: s.n for s in summarise(records)} == dict.fromkeys((f.task for f in tasks.facts), 2)


def test_tasks_that_are_not_from_files_are_sampled_by_number(folder, tokenizer, monkeypatch, tmp_path):
    """A task by name alone; the library finds it in a folder here, where it would look among its own."""
    source = TaskSource("piqa", folder / "piqa")
    site = Path(harness_module.load_harness(offline=True).__file__).parent
    write_tasks(source, read_source(source), tmp_path, site)
    load = prepare_module._load
    monkeypatch.setattr(
        prepare_module, "_load", lambda names, _, defaults: load(names, tmp_path, defaults=not defaults)
    )
    whole = run_tasks(RuleScorer("a", tokenizer), [source])
    with prepared([TaskSource("piqa_local")], samples=2, seed=1, shots=3) as tasks:
        (facts,) = tasks.facts
        some = ask(tasks, RuleScorer("a", tokenizer))
    assert (facts.task, facts.shots, facts.items, facts.of, facts.sources) == ("piqa_local", 0, 2, 3, {})
    numbers = {record.doc_id for record in some}
    assert len(numbers) == 2
    assert some == [record for record in whole if record.doc_id in numbers]
