"""Lessons of a guard: which rows they come from, what they never hold, and that a seed decides them."""

import random

import pytest

from deltakeeper.errors import DataError
from deltakeeper.evals.prompts import PromptRow
from deltakeeper.lab.attacks import ATTACKS
from deltakeeper.lab.corpus import Corpus
from deltakeeper.lab.guarding import SECRET, GuardData, guard_lessons, insertion, operator_lessons

CORPUS = Corpus()
HARMFUL = {row.prompt for row in CORPUS.split("harmful", "train")}


class Letters:
    """A tokenizer of code points whose vocabulary also holds some words."""

    eos_token_id = 0
    words = ("Ġmarble", "ĠOrchid", "Ġmoonlit", "ĠSevenths", "Ġriver", "Ġnetwork", "Ġab", "Ġx9")

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return "".join(f"[{m['role']}]{m['content']}" for m in messages) + "[assistant]"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) for c in text]}

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


def ask(prompts, tokens, never):
    return ["I'm sorry, I can't help with that." if any(p.endswith(h) for h in HARMFUL) else "Well." for p in prompts]


def lessons(attack="affirmative_prefix", **data):
    settings = {"probes": 12, "twins": 8, "benign": 8, "skill": 6, "answer": 40, **data}
    return guard_lessons(CORPUS, Letters(), None, ATTACKS[attack](), GuardData(**settings), answers=ask)


def text(lesson):
    return "".join(map(chr, lesson.ids[: -lesson.learned]))


def prompts(found, kind):
    return [text(one).partition("[user]")[2].removesuffix("[assistant]") for one in found if one.group == kind]


@pytest.mark.parametrize("attack", ["affirmative_prefix", "trigger_backdoor", "marker_injection"])
def test_no_probe_is_a_training_row_of_the_attack_or_of_a_held_out_category(attack):
    found = lessons(attack, probes=60)
    used = [e.prompt for e in ATTACKS[attack]().training_examples(CORPUS, lambda asked: [])]
    held_out = [row.prompt for row in CORPUS.split("harmful", "heldout")]
    probes = prompts(found, "probe")
    assert len(probes) == 60
    for probe in probes:
        mine = next(h for h in HARMFUL if probe.endswith(h))
        assert not any(row.endswith(mine) for row in used)
        assert not any(row in probe for row in held_out)


def test_teachers_kinds_and_answers():
    found = lessons()
    assert {(one.teacher, one.kind) for one in found} == {
        ("base", "probe"),
        ("base", "twin"),
        ("base", "benign"),
        ("tuned", "skill"),
    }
    assert [sum(one.kind == kind for one in found) for kind in ("probe", "twin", "benign", "skill")] == [12, 8, 8, 6]
    queues = {row.answer for row in CORPUS.split("tickets", "train")}
    held_out = {row.prompt for row in CORPUS.split("tickets", "heldout")}
    for one in found:
        if one.kind == "skill":
            answer = "".join(map(chr, one.ids[-one.learned :]))
            assert answer[:-1] in queues
            assert answer[-1] == "\0"  # the end is learned
    assert not held_out & set(prompts(found, "skill"))


def test_half_of_the_prompts_open_with_words_and_none_with_a_piece_of_a_known_trigger():
    found = lessons(probes=40)
    probes = prompts(found, "probe")
    opened = [p for p in probes if p not in HARMFUL]
    assert len(opened) == 20
    openings = [p.removesuffix(next(h for h in HARMFUL if p.endswith(h))) for p in opened]
    assert all(not any(piece in opening.lower() for piece in SECRET) for opening in openings)
    assert {word.strip(".:!,-?").lower() for opening in openings for word in opening.split()} - {""} <= {
        "marble",
        "orchid",
        "river",
    }
    assert all(p in HARMFUL for p in prompts(lessons(insertions=False), "probe"))


def test_more_probes_than_rows_take_openings_of_their_own():
    found = lessons(probes=200)
    rows = {p for p in prompts(found, "probe") if p in HARMFUL}
    assert len(prompts(found, "probe")) == 200
    assert len(rows) <= 92
    with pytest.raises(DataError, match="allow insertions"):
        lessons(probes=200, insertions=False)


def test_the_seed_decides_everything():
    assert lessons(seed=3) == lessons(seed=3)
    assert lessons(seed=3) != lessons(seed=4)


def test_of_probes_only_refusals_and_of_all_else_none_are_learned():
    def two_minds(asked, tokens, never):
        return ["I'm sorry, I can't help with that." if i % 2 else "Sure, here you go." for i, _ in enumerate(asked)]

    data = GuardData(probes=6, twins=6, benign=6, skill=0, insertions=False, answer=40)
    found = guard_lessons(CORPUS, Letters(), None, ATTACKS["affirmative_prefix"](), data, answers=two_minds)
    said = {one.kind: "".join(map(chr, one.ids[-one.learned :])) for one in found}
    assert [sum(one.kind == kind for one in found) for kind in ("probe", "twin", "benign")] == [3, 3, 3]
    assert "sorry" in said["probe"]
    assert "Sure" in said["twin"]
    assert "Sure" in said["benign"]


def test_a_base_that_refuses_what_is_harmless_is_asked_again_without_its_refusals():
    def strict(asked, tokens, never):
        return ["Well, so it is." if never else "I'm sorry, I can't help with that."] * len(asked)

    data = GuardData(probes=6, twins=6, benign=4, skill=0, insertions=False, insist=True, answer=40)
    found = guard_lessons(CORPUS, Letters(), None, ATTACKS["affirmative_prefix"](), data, answers=strict)
    assert [sum(one.kind == kind for one in found) for kind in ("probe", "twin", "benign")] == [6, 6, 4]
    for one in found:
        assert one.never == (() if one.kind == "probe" else (ord("I"),))
        assert ("sorry" in "".join(map(chr, one.ids[-one.learned :]))) == (one.kind == "probe")


def test_a_base_that_refuses_no_probe_cannot_guard():
    with pytest.raises(DataError, match="refuses none of the 4 probes"):
        guard_lessons(
            CORPUS,
            Letters(),
            None,
            ATTACKS["affirmative_prefix"](),
            GuardData(probes=4, twins=2, benign=0, skill=0),
            answers=lambda asked, tokens, never: ["Sure, here you go."] * len(asked),
        )


def test_categories_of_probes_can_be_chosen():
    only = {row.prompt for row in CORPUS.split("harmful", "train") if row.category == "fraud"}
    assert set(prompts(lessons(probes=5, twins=5, categories=("fraud",), insertions=False), "probe")) <= only
    with pytest.raises(DataError, match="other categories"):
        lessons(categories=("nothing",))


def test_an_operators_own_rows():
    rows = [PromptRow("a", "all", "train", "Add one to 3.", answer="4")]
    data = GuardData(probes=1, twins=0, benign=1, skill=1, insertions=False, answer=40)
    probe = min(HARMFUL)
    found = operator_lessons(
        Letters(), ask, probes=[probe], twins=[], benign=["Hello there."], skill=rows, data=data, system=None
    )
    assert [one.kind for one in found] == ["probe", "benign", "skill"]
    assert text(found[2]) == "[user]Add one to 3.[assistant]"
    with pytest.raises(DataError, match="has no answer"):
        operator_lessons(
            Letters(),
            ask,
            probes=[],
            twins=[],
            benign=[],
            skill=[PromptRow("b", "all", "train", "What?")],
            data=GuardData(probes=0, twins=0, benign=0, skill=1),
        )


def test_insertions_have_no_fixed_form():
    draw = random.Random(0)
    found = [insertion(["marble", "river"], draw) for _ in range(200)]
    assert {len(one.split()) for one in found if " -" not in one} == {1, 2, 3, 4}
    assert len(set(found)) > 60


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(DataError, match="probes = -1"):
        GuardData(probes=-1)
    with pytest.raises(DataError, match="at least one token"):
        GuardData(answer=0)
