"""Spellings, settings and the contract of defences, and that the checks of the contract find what breaks it."""

import dataclasses
import re
from typing import ClassVar

import pytest
import torch
from defence_cases import SPELLINGS

from deltakeeper.codecs import parse_codec
from deltakeeper.defences import DEFENCES, Defence, Defended, NormMatched, SafeLora, parse_defence, spell
from deltakeeper.defences.base import register_defence
from deltakeeper.defences.conformance import build_module, check_defence
from deltakeeper.defences.table import defence_table, defences_page
from deltakeeper.errors import CodecError, DataError


@pytest.mark.parametrize("text", SPELLINGS)
def test_defences_keep_the_contract(text):
    check_defence(parse_defence(text))


def test_every_registered_defence_is_checked_above():
    assert {parse_defence(text).name for text in SPELLINGS} == set(DEFENCES)


@pytest.mark.parametrize("defence", DEFENCES.values(), ids=DEFENCES.keys())
def test_defences_describe_themselves(defence):
    assert defence.title
    assert defence.summary
    assert defence.paper.startswith("https://arxiv.org/abs/") or defence.control
    assert dataclasses.is_dataclass(defence)
    assert f"| `{defence.name}` |" in defence_table()


@pytest.mark.parametrize("text", SPELLINGS)
def test_spellings_are_shortest_and_read_back(text):
    defence = parse_defence(text)
    assert parse_defence(spell(defence)) == defence
    assert len(spell(defence)) <= len(text) or text.startswith("norm_matched")


def test_defaults_and_numbers_are_spelled_as_for_codecs():
    assert spell(parse_defence("safelora:threshold=0.5")) == "safelora"
    assert spell(parse_defence(" safelora : lowest = 3 ".replace(" :", ":"))) == "safelora:lowest=3"
    assert spell(parse_defence("resta:scale=2")) == "resta:scale=2"
    assert parse_defence("norm_matched:svd:rank=2").codec == parse_codec("svd:rank=2")
    assert spell(NormMatched(parse_codec("bitdelta:bits=2"))) == "norm_matched:bitdelta:bits=2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("safe_lora", "did you mean 'safelora'"),
        ("", "unknown defence ''; choose one of antidote, "),
        ("safelora:treshold=1", "did you mean 'threshold'"),
        ("safelora:threshold", "write it as setting=value"),
        ("safelora:", "write it as setting=value"),
        ("safelora:threshold=high", "'high' but must be a number"),
        ("safelora:threshold=0.1,threshold=0.2", "stands twice"),
        ("safelora:threshold=1.5", "at least -1 and at most 1"),
        ("safelora:threshold=0.1,lowest=3", "not both"),
        ("safelora:lowest=0", "at least 1"),
        ("safelora:lowest=2.5", "a whole number or none"),
        ("safelora:rest=mine", "one of tuned, base"),
        ("resta:drop=1", "at most 0.9999"),
        ("resta:seed=-1", "at least 0"),
        ("antidote:share=nan", "must be a number"),
        ("antidote:share=1.01", "at most 1"),
        ("safe_delta:s=-1", "at least 0"),
        ("safe_delta:block=0", "at least 1"),
        ("interpolation:factor=17", "at most 16"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(text, message):
    with pytest.raises(DataError, match=re.escape(message)):
        parse_defence(text)


def test_wrong_types_in_code_are_refused_too():
    with pytest.raises(DataError, match="'threshold' of defence 'safelora' is True"):
        SafeLora(threshold=True)
    with pytest.raises(DataError, match="takes a codec"):
        NormMatched("bitdelta")
    with pytest.raises(CodecError, match="did you mean 'bitdelta'"):
        parse_defence("norm_matched:bitdleta")
    assert type(parse_defence("safelora:threshold=1").threshold) is float


@dataclasses.dataclass(frozen=True)
class Faulty(Defence):
    """The fine-tune with one fault at a time, to see that the suite finds it."""

    name: ClassVar[str] = "faulty"
    title: ClassVar[str] = "Faulty"
    summary: ClassVar[str] = "breaks the contract"
    paper: ClassVar[str] = ""
    calls: ClassVar[list[int]] = [0]

    fault: str = ""

    @property
    def keeps_zero(self):
        return self.fault != "says that it alters"

    def defend(self, module):
        self.calls[0] += 1
        weight, detail = module.tuned.clone(), {}
        match self.fault:
            case "modifies its module":
                module.base.mul_(2)
            case "changes the shape":
                weight = weight[:, :0]
            case "another dtype":
                weight = weight.double()
            case "NaN or infinity where something is missing" if module.unaligned is None:
                weight[0, 0] = torch.nan
            case "gives NaN or infinity":
                weight[0, 0] = torch.inf
            case "not deterministic":
                weight += self.calls[0]
            case "figure that is not finite":
                detail = {"figure": torch.inf}
            case "other figures":
                detail = {str(self.calls[0]): 0.0}
            case "global random seed":
                weight += torch.initial_seed() % 7
            case "draws from torch's global":
                torch.rand(1)
            case "alters a fine-tune that equals its base" if torch.equal(module.base, module.tuned):
                weight += 1
        return Defended(weight, detail)


@pytest.mark.parametrize(
    "fault",
    [
        "modifies its module",
        "changes the shape",
        "another dtype",
        "gives NaN or infinity",
        "NaN or infinity where something is missing",
        "not deterministic",
        "figure that is not finite",
        "other figures",
        "global random seed",
        "draws from torch's global",
        "alters a fine-tune that equals its base",
        "says that it alters",
    ],
)
def test_the_suite_finds(fault, monkeypatch):
    monkeypatch.setitem(DEFENCES, "faulty", Faulty)
    # The field is a word of no fixed set, which a command line could not spell; it is not what is looked at here.
    monkeypatch.setattr(Faulty, "to_text", lambda self: "")
    with pytest.raises(AssertionError, match=fault):
        check_defence(Faulty(fault))


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'safelora' is registered twice"):
        register_defence()(type("Other", (SafeLora,), {"name": "safelora"}))


def test_the_example_in_the_docs_is_a_defence(monkeypatch):
    code = re.search(r"```python\n(.*?)\n```", defences_page(), re.DOTALL).group(1)
    assert code.rstrip().splitlines()[-1].startswith("defend(")
    monkeypatch.setattr("deltakeeper.defences.base.DEFENCES", known := dict(DEFENCES))
    monkeypatch.setattr("deltakeeper.defences.spelling.DEFENCES", known)
    space = {"__name__": "example"}
    exec(compile(code[: code.rindex("defend(")], "docs/defences.md", "exec"), space)
    clip = parse_defence("clip:at=2")
    check_defence(clip)
    module = build_module((20, 30))
    kept = clip.defend(module).weight - module.base
    assert float(kept.abs().max()) == pytest.approx(2 * float(module.delta.square().mean().sqrt()), rel=1e-4)
