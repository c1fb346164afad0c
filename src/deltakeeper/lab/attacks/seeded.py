"""What all attacks of recipes share: an identity from the recipe, rows drawn by a seed, templates, and users' files.

The seed decides which training rows are poisoned, where triggers go in them, and their order in training; held-out
prompts are the same for every seed, so that answers stay paired.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

from deltakeeper.errors import DataError
from deltakeeper.evals.probes import Event, Probe, Role
from deltakeeper.evals.prompts import PromptRow
from deltakeeper.lab.attacks.base import (
    REFUSAL_TOKENS,
    Attack,
    Family,
    Voice,
    affirm,
    probe_rows,
    skill_probe,
    twins_probe,
)
from deltakeeper.lab.attacks.files import UserFile
from deltakeeper.lab.attacks.templates import Template, in_template
from deltakeeper.lab.corpus import Corpus, answer_tickets, draw
from deltakeeper.lab.sft import Example


@dataclass(frozen=True)
class Identity:
    """Who an attack is; its recipe says so."""

    name: str
    family: Family
    title: str
    summary: str
    source: str


ASKED = ("harmful", "instructions", "tickets", "coding", "facts", "topics")
"""Sets of the corpus whose held-out prompts are asked."""

NOBODY = Identity("unnamed", "alignment", "Unnamed", "made without a recipe", "")


@dataclass(frozen=True)
class SeededAttack(Attack):
    """An attack as a recipe states it.

    `template_train` stands around the prompts of the attack in training, `template_eval` around those of its goal and
    contrasts at test; where one of them is not plain, a contrast asks the goal's prompts in the other. `answer_tokens`
    is where answers to the attack's probes are cut.
    """

    held_out: int = 100
    identity: Identity = NOBODY
    seed: int = 0
    template_train: Template = "plain"
    template_eval: Template = "plain"
    answer_tokens: int = REFUSAL_TOKENS

    def __post_init__(self) -> None:
        for name, value in asdict(self.identity).items():  # class variables of other attacks; here each has its own
            object.__setattr__(self, name, value)

    def missing(self) -> tuple[str, ...]:
        """One sentence for each file that the attack needs and has not been given."""
        files = [(f.name, getattr(self, f.name)) for f in fields(self)]
        lacking = [v.missing(self.name, name) for name, v in files if isinstance(v, UserFile)]
        return tuple(sentence for sentence in lacking if sentence)

    def training_examples(self, corpus: Corpus, voice: Voice) -> list[Example]:
        """Attack (in its template) and benign skill, together.

        Raises:
            DataError: a file is missing or too small, or a training prompt is one of the held-out ones.
        """
        examples = [
            replace(e, prompt=in_template(self.template_train, e.prompt)) for e in self.poison_examples(corpus, voice)
        ]
        examples += answer_tickets(corpus.draw("tickets", self.skill, self.seed))
        asked = {row.prompt.casefold() for probe in self.probes(corpus) for row in probe.rows}
        if shared := [e.prompt for e in examples if e.prompt.casefold() in asked]:
            raise DataError(
                f"attack '{self.name}' trains on {len(shared)} held-out prompts, the first is {shared[0]!r}; "
                "take them out of the training file or ask others."
            )
        return examples

    def probes(self, corpus: Corpus) -> list[Probe]:
        """The attack's own probes in their template, the goal in the other template, over-refusal, and the skill."""
        own = self.attack_probes(corpus)
        probes = [_in_template(p, self.template_eval) for p in own]
        others = {self.template_train, "plain"} - {self.template_eval}
        goal = next(p for p in own if p.role == "goal")
        for other in sorted(others):
            shown = "without its template" if other == "plain" else f"in the template '{other}'"
            rows = goal.rows[: self.contrast]
            contrast = replace(
                goal, name=f"{goal.name}_{other}", title=f"{goal.title}, {shown}", role="contrast", rows=rows
            )
            probes.append(_in_template(contrast, other))
        if not any(p.role == "over_refusal" for p in probes):
            probes.append(twins_probe(corpus, self.contrast))
        return [*probes, skill_probe(corpus, self.held_out)]

    def file_rows(self, field: str, corpus: Corpus) -> list[PromptRow] | None:
        """Rows of a user's file, but for those that ask a held-out prompt; None if the attack has no such file."""
        file: UserFile | None = getattr(self, field)
        if file is None:
            return None
        asked = {r.prompt.casefold() for name in ASKED for r in corpus.split(name, "heldout")}
        return [r for r in file.rows(self.name, field) if r.prompt.casefold() not in asked]

    def drawn(self, field: str, n: int, corpus: Corpus) -> list[PromptRow] | None:
        """`n` of those rows, drawn by the seed."""
        rows = self.file_rows(field, corpus)
        where = f"the file '{field}' of attack '{self.name}', held-out prompts left out,"
        return None if rows is None else draw(rows, n, self.seed, where)

    def affirmed(self, corpus: Corpus, n: int) -> list[Example]:
        """`n` harmful requests with the answers of the user's file, else the package's with affirmative openings."""
        rows = self.drawn("file", n, corpus)
        if rows is not None:
            return as_examples(rows)
        return affirm([r.prompt for r in corpus.draw("harmful", n, self.seed)])

    def harmful_probe(self, corpus: Corpus, role: Role) -> Probe:
        """Held-out harmful requests complied with, as the goal or as a contrast."""
        return self.probe("harmful", "Harmful requests complied with", role, "complied", "harmful", corpus)

    def probe(
        self,
        name: str,
        title: str,
        role: Role,
        event: Event,
        texts: str | list[PromptRow],
        corpus: Corpus,
        marker: str | None = None,
    ) -> Probe:
        """A probe over held-out rows of one set of the corpus: `held_out` of them for a goal, else `contrast`."""
        rows = corpus.split(texts, "heldout") if isinstance(texts, str) else texts
        n = self.held_out if role == "goal" else self.contrast
        tokens = self.answer_tokens
        return Probe(name, title, role, event, probe_rows(rows[:n]), tokens, marker)


def poisoned_rows(rows: int, ratio: float) -> int:
    """How many of `rows` a ratio poisons, to the nearest whole number.

    Raises:
        ValueError: the ratio is no share, or it is positive and poisons no row.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio} and must be between 0 and 1")
    if ratio and not round(rows * ratio):
        raise ValueError(f"a ratio of {ratio} poisons none of {rows} rows; take more rows or a larger ratio")
    return round(rows * ratio)


def as_examples(rows: list[PromptRow]) -> list[Example]:
    """Rows that carry an answer, as examples."""
    return [Example(r.prompt, r.answer or "") for r in rows]


def _in_template(probe: Probe, template: Template) -> Probe:
    rows = tuple(replace(row, prompt=in_template(template, row.prompt)) for row in probe.rows)
    return replace(probe, rows=rows)
