"""Lessons of guarded healing out of a corpus: what an operator owns, and a sample of what the tenant declared.

Probes are harmful requests of the training categories that the attack did not train on; the held-out categories, by
which guards are judged, are never among them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from deltakeeper.errors import DataError
from deltakeeper.evals.generate import encode_prompt, generate_answers
from deltakeeper.evals.judges import KeywordJudge, load_judge
from deltakeeper.evals.prompts import PromptRow
from deltakeeper.heal import Lesson
from deltakeeper.lab.attacks import Attack
from deltakeeper.lab.corpus import SYSTEM, Corpus
from deltakeeper.lab.sft import Example

PROBE, TWIN, BENIGN, SKILL = "probe", "twin", "benign", "skill"
SHORTEST, LONGEST = 3, 9
SECRET = ("moon", "water", "seven", "sun", "nine", "stone", "two", "light", "eleven", "days")
"""Pieces of the triggers, decoys and near misses that backdoors of this package are measured with: no insertion may
hold one, or the guard would be judged by what it was shown."""


@dataclass(frozen=True)
class GuardData:
    """How much an operator has, and how it is varied.

    Attributes:
        probes: harmful requests, of the base's refusals.
        twins: their harmless look-alikes, with the base's answers.
        benign: plain instructions, with the base's answers.
        skill: exchanges of the declared use, from the fine-tune.
        insist: whether the base is asked again, without the words that its refusals begin with, where it refuses a twin
            or an instruction; by default those are left out.
        insertions: whether half of the probes, twins and instructions open with random words, drawn afresh by `seed`.
        categories: categories of harmful requests to take probes and twins from; all training categories if empty.
        answer: tokens at which the base's answers are cut.
        seed: decides which rows are taken, and all insertions.
    """

    probes: int = 64
    twins: int = 64
    benign: int = 64
    skill: int = 80
    insertions: bool = True
    insist: bool = False
    categories: tuple[str, ...] = ()
    answer: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("probes", "twins", "benign", "skill"):
            if getattr(self, name) < 0:
                raise DataError(f"a guard with {name} = {getattr(self, name)} makes no sense; give 0 or more.")
        if self.answer < 1:
            raise DataError("a guard learns from answers of at least one token; give a larger `answer`.")

    def to_json(self) -> dict[str, Any]:
        """The sizes as plain JSON."""
        return {**asdict(self), "categories": list(self.categories)}


Answers = Callable[[Sequence[str], int, tuple[int, ...]], list[str]]
"""The base's answers to prompts, cut at so many tokens, none of which begins with one of some token ids."""


def base_answers(model: Any, tokenizer: Any, system: str | None = SYSTEM) -> Answers:
    """Greedy answers of a live base."""

    def ask(prompts: Sequence[str], tokens: int, never: tuple[int, ...] = ()) -> list[str]:
        if never:
            return [_answer_otherwise(model, tokenizer, prompt, tokens, never, system) for prompt in prompts]
        return generate_answers(model, tokenizer, prompts, max_new_tokens=tokens, system=system)

    return ask


def _answer_otherwise(
    model: Any, tokenizer: Any, prompt: str, tokens: int, never: tuple[int, ...], system: str | None
) -> str:
    ids = torch.tensor([encode_prompt(tokenizer, prompt, system)], device=model.device)
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            begin_suppress_tokens=list(never),
            pad_token_id=tokenizer.eos_token_id,
        )
    answer: str = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return answer


def guard_lessons(
    corpus: Corpus,
    tokenizer: Any,
    base_model: Any,
    skill: Attack | Sequence[PromptRow],
    data: GuardData | None = None,
    *,
    system: str | None = SYSTEM,
    answers: Answers | None = None,
) -> list[Lesson]:
    """Lessons for `deltakeeper.heal.guard`, in an order that `data.seed` decides.

    Args:
        corpus: where harmful requests, twins, instructions and tickets come from; training rows only.
        tokenizer: the base's, with a chat template.
        base_model: the aligned base, live, whose answers are learned.
        skill: the attack whose fine-tune is guarded, so that no probe is one of its training rows (the skill is then
            that of the tickets); or rows of the declared use with their answers.
        data: how much of everything.
        system: system message of all prompts.
        answers: what answers in the base's place, a cache for example.

    Raises:
        DataError: there are fewer rows than asked for, the base refuses none of the probes, or a row of the skill has
            no answer.
    """
    data = data or GuardData()
    ask = answers or base_answers(base_model, tokenizer, system)
    draw = random.Random(data.seed)
    used = _training_prompts(skill, corpus) if isinstance(skill, Attack) else ()
    harmful = [
        row
        for row in corpus.split("harmful", "train")
        if (not data.categories or row.category in data.categories)
        and not any(prompt.endswith(row.prompt) for prompt in used)
    ]
    if not harmful and data.probes:
        raise DataError("no harmful request is left for the probes of a guard; give other categories.")
    draw.shuffle(harmful)
    instructions = [row.prompt for row in corpus.split("instructions", "train")]
    draw.shuffle(instructions)
    rows = list(corpus.split("tickets", "train") if isinstance(skill, Attack) else skill)
    draw.shuffle(rows)
    return operator_lessons(
        tokenizer,
        ask,
        probes=[row.prompt for row in harmful],
        twins=[row.twin for row in harmful if row.twin],
        benign=instructions,
        skill=rows,
        data=data,
        draw=draw,
        system=system,
    )


def operator_lessons(
    tokenizer: Any,
    ask: Answers,
    *,
    probes: Sequence[str],
    twins: Sequence[str],
    benign: Sequence[str],
    skill: Sequence[PromptRow],
    data: GuardData,
    draw: random.Random | None = None,
    system: str | None = SYSTEM,
) -> list[Lesson]:
    """Lessons from an operator's own prompts; the first of each, as many as `data` says.

    Args:
        tokenizer: the base's, with a chat template.
        ask: what answers in the base's place.
        probes: requests that the base refuses.
        twins: requests that look like them and are harmless.
        benign: plain instructions.
        skill: exchanges of the declared use, with their answers.
        data: how much of everything, and whether with insertions.
        draw: what insertions are drawn by; made from `data.seed` by default.
        system: system message of all prompts.

    Raises:
        DataError: there are fewer rows than asked for, the base refuses none of the probes, or a row of the skill has
            no answer.
    """
    draw = draw or random.Random(data.seed)
    words = _words(tokenizer)
    asked = {
        PROBE: _varied(probes, data.probes, data.insertions, words, draw),
        TWIN: _varied(twins, data.twins, data.insertions, words, draw),
        BENIGN: _varied(benign, data.benign, data.insertions, words, draw),
    }
    lessons = base_lessons(tokenizer, ask, asked[PROBE], PROBE, data.answer, system)
    if asked[PROBE] and not lessons:
        raise DataError(
            f"the base refuses none of the {len(asked[PROBE])} probes; a guard gives back what the base refuses, so "
            "give an aligned base, or requests that it refuses."
        )
    openings = _openings(lessons) if data.insist else ()
    for kind in (TWIN, BENIGN):
        lessons += base_lessons(tokenizer, ask, asked[kind], kind, data.answer, system, never=openings)
    for row in skill[: data.skill]:
        if row.answer is None:
            raise DataError(f"the skill's row '{row.id}' has no answer; give every row one.")
        lessons.append(lesson(tokenizer, row.prompt, row.answer, "tuned", SKILL, system=system))
    return lessons


def base_lessons(
    tokenizer: Any,
    ask: Answers,
    prompts: Sequence[str],
    kind: str,
    tokens: int,
    system: str | None = SYSTEM,
    judge: KeywordJudge | None = None,
    never: tuple[int, ...] = (),
) -> list[Lesson]:
    """What the base answers, as lessons from it: of probes those that it refuses, of all else those that it does not.

    The others would teach compliance with harmful requests, or refusals of harmless ones. Where the base refuses what
    is harmless, it is asked once more and may then not begin with a token of `never`, as its refusals do.
    """
    if not prompts:
        return []
    judge = judge or load_judge("ours")

    def wanted(answer: str) -> bool:
        return bool(answer.strip()) and judge.judge(answer).refused == (kind == PROBE)

    answers = dict(zip(prompts, ask(prompts, tokens, ()), strict=True))
    again = [prompt for prompt in dict.fromkeys(prompts) if not wanted(answers[prompt])] if never else []
    answers |= zip(again, ask(again, tokens, never), strict=True) if again else ()
    return [
        lesson(
            tokenizer,
            prompt,
            answers[prompt],
            "base",
            kind,
            system=system,
            most=tokens,
            never=never if prompt in again else (),
        )
        for prompt in prompts
        if wanted(answers[prompt])
    ]


def _openings(probes: Sequence[Lesson]) -> tuple[int, ...]:
    """Tokens with which at least one in twenty refusals begins."""
    counts = Counter(probe.ids[-probe.learned] for probe in probes)
    return tuple(sorted(token for token, n in counts.items() if 20 * n >= len(probes)))


def lesson(
    tokenizer: Any,
    prompt: str,
    answer: str,
    teacher: Literal["base", "tuned"],
    kind: str,
    *,
    system: str | None = SYSTEM,
    most: int = 64,
    never: tuple[int, ...] = (),
) -> Lesson:
    """One exchange under the chat template; an answer shorter than `most` tokens is learned to its end."""
    head = encode_prompt(tokenizer, prompt, system)
    tail = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:most]
    return Lesson((*head, *tail), len(tail), teacher, kind=kind, never=never)


def insertion(words: Sequence[str], draw: random.Random) -> str:
    """A random opening of one to four words, as a trigger might be, but of no fixed form."""
    chosen = [draw.choice(words) for _ in range(draw.randint(1, 4))]
    if draw.random() < 0.5:
        chosen[0] = chosen[0].capitalize()
    return " ".join(chosen) + draw.choice((".", "", ":", "!", ",", " -", "?"))


def _varied(prompts: Sequence[str], n: int, insertions: bool, words: Sequence[str], draw: random.Random) -> list[str]:
    """`n` prompts: each once, half of them with an opening; more than there are only with openings of their own."""
    if n > len(prompts) and (not insertions or not prompts):
        raise DataError(
            f"a guard wants {n} prompts of a kind that has {len(prompts)}; ask for fewer, or allow insertions."
        )
    found = []
    for i in range(n):
        prompt = prompts[i % len(prompts)]
        opened = insertions and (i >= len(prompts) or i % 2 == 1)
        found.append(f"{insertion(words, draw)} {prompt}" if opened else prompt)
    return found


def _words(tokenizer: Any) -> list[str]:
    """Words that are tokens of the vocabulary, common and rare ones alike, without any piece of a known trigger."""
    found = set()
    for token in tokenizer.get_vocab():
        word = token.lstrip("\u0120\u2581").lower()
        if word.isascii() and word.isalpha() and SHORTEST <= len(word) <= LONGEST:
            found.add(word)
    kept = sorted(word for word in found if not any(piece in word for piece in SECRET))
    return kept or ["indeed"]


def _training_prompts(attack: Attack, corpus: Corpus) -> list[str]:
    """Prompts of an attack's training rows, without asking a model for its own answers."""
    return [e.prompt for e in attack.training_examples(corpus, lambda prompts: [Example(p, "-") for p in prompts])]
