import dataclasses
from typing import ClassVar

import pytest
import torch

from deltakeeper.codecs import CODECS, Codec, SumCodec, parse_codec, spell
from deltakeeper.errors import CodecError
from deltakeeper.layouts import Dense
from deltakeeper.testing import check_codec

LADDERS = [
    ["bitdelta:bits=1", "bitdelta:bits=2", "bitdelta:bits=4", "bitdelta:bits=8"],
    ["bitdelta:scale=row", "bitdelta:bits=3,scale=row,zero=plus"],
    ["bitdelta:scale=column,zero=minus", "bitdelta:bits=2,scale=column,zero=minus"],
    ["bitdelta:zero=zero", "bitdelta:bits=5,zero=zero"],
    ["svd:rank=1", "svd:rank=4", "svd:rank=16", "svd:rank=64"],
    ["svd:energy=0.3", "svd:energy=0.9", "svd:energy=1"],
    ["svd:rank=2,method=exact,factors=bfloat16", "svd:rank=9,method=exact,factors=bfloat16"],
    ["svd:rank=3,factors=float32,niter=1,oversample=0", "svd:rank=12,factors=float32,niter=8"],
    ["magnitude:keep=0.01", "magnitude", "magnitude:keep=0.5", "magnitude:keep=1"],
    ["magnitude:per=row,values=bfloat16", "magnitude:keep=0.3,per=row,values=float32"],
    ["magnitude:keep=0.9,rescale=true"],
    ["dare:p=0.99", "dare", "dare:p=0.5", "dare:p=0"],
    ["dare:p=0.9,q=0.5,values=bfloat16", "dare:p=0.5,q=1,values=float32"],
    ["dare:p=0.9,fit_q=error", "dare:p=0.5,fit_q=bound"],
    ["dare:q=0.5,values=int4", "dare:q=0.5,values=int8", "dare:p=0.5,q=1,values=int8"],
    ["compeft:keep=0.01", "compeft", "compeft:keep=0.3"],
    ["compeft:keep=0.05,scale=std,alpha=2", "compeft:keep=0.3,scale=std"],
    ["ultradelta:rescale=none", "ultradelta:p=0.5,rescale=none", "ultradelta:p=0,bits=8,rescale=none"],
    ["ultradelta", "ultradelta:p=0.9,bits=8", "ultradelta:p=0.5,bits=8,step=0"],
    ["ultradelta:p=0.9,rescale=trace", "ultradelta:p=0.3,rescale=trace"],
    ["rtn:bits=2", "rtn:bits=3", "rtn", "rtn:bits=8"],
    ["rtn:bits=2,group=16,symmetric=false", "rtn:bits=5,group=16,symmetric=false,scale=float32"],
    ["rtn:group=0,scale=float32", "rtn:bits=6,group=7,scale=float32"],
    ["dqrelo:rank=1", "dqrelo", "dqrelo:rank=64"],
    ["dqrelo:factors=int2,refit=true", "dqrelo:factors=int4,refit=true", "dqrelo:factors=bfloat16,refit=true"],
    ["dqrelo:rank=4,scale=row,zero=zero,refit=true", "dqrelo:rank=32,scale=row,zero=zero,refit=true"],
    ["dqrelo:factors=int3,group=0,scale=column,zero=minus,refit=true"],
    ["deltazip:bits=2", "deltazip", "deltazip:bits=8"],
    ["deltazip:bits=2,search=true", "deltazip:bits=5,search=true,calibrated=false"],
    ["deltazip:pattern=unstructured,keep=0.1", "deltazip:pattern=unstructured", "deltazip:pattern=unstructured,keep=1"],
    ["impart:cr=64", "impart", "impart:cr=8", "impart:cr=2"],
    ["impart:values=int8,rescale=none", "impart:cr=8,values=int8,rescale=none"],
    ["impart:beta=0.5,c=1,values=bands,rescale=none", "impart:cr=8,beta=0.5,c=1,values=bands,rescale=none"],
    ["dense"],
    ["delta_come:bpw=0.3", "delta_come", "delta_come:bpw=2", "delta_come:bpw=4"],
    ["delta_come:bpw=0.5,refine=false,search=false", "delta_come:bpw=2,refine=false,search=false"],
    ["delta_come:rank8=1,rank3=0,rank2=1,group=0", "delta_come:rank8=4,rank3=3,rank2=9,group=32,calibrated=false"],
    ["shrink:factor=0", "shrink:factor=0.3", "shrink:factor=1"],
    ["random_sign"],
    ["random_sign:scale=row", "random_sign:scale=column"],
    ["bitdelta", "bitdelta+svd:rank=2", "bitdelta+svd:rank=2+magnitude:keep=0.3"],
]


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ladder[0])
def test_codecs_keep_the_contract(ladder):
    codecs = [parse_codec(text) for text in ladder]
    grows = len(codecs) > 1 and not isinstance(codecs[0], type(parse_codec("random_sign")))
    for codec in codecs:
        minimises = getattr(codec, "fit_q", None) != "bound"  # which is about the largest error, not the mean square
        steps = codecs if grows else ()
        check_codec(codec, ladder=steps, seed_matters=_seed_matters(codec), inputs_help=minimises)


def _seed_matters(codec):
    """A converged decomposition hides its seed, and nothing is random when nothing is dropped."""
    return False if codec.name == "svd" or getattr(codec, "p", 1) == 0 else None


def test_every_registered_codec_is_checked_above():
    assert {parse_codec(ladder[0]).name for ladder in LADDERS} == set(CODECS)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
def test_codecs_describe_themselves(codec):
    assert codec.title
    assert codec.summary
    assert codec.paper.startswith("https://") or not codec.paper
    assert dataclasses.is_dataclass(codec)


@pytest.mark.parametrize("codec", ["bitdelta", "svd:rank=2", "magnitude", "dare", "dense", "shrink", "random_sign"])
@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (torch.zeros(3), "float32 matrices"),
        (torch.zeros(2, 3, 4), "float32 matrices"),
        (torch.zeros(0, 4), "float32 matrices"),
        (torch.zeros(3, 4, dtype=torch.bfloat16), "float32 matrices"),
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinity"),
        (torch.tensor([[1.0, -float("inf")]]), "NaN or infinity"),
    ],
)
def test_unfit_deltas_are_refused_by_name(codec, delta, message):
    with pytest.raises(CodecError, match=f"'w'.*{message}"):
        parse_codec(codec).encode(delta, name="w")


def test_a_sum_encodes_what_is_left_over():
    delta = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    first, second = parse_codec("bitdelta").encode(delta, name="w")[0], parse_codec("svd:rank=3")
    terms = parse_codec("bitdelta+svd:rank=3").encode(delta, name="w")
    residual = second.encode(delta - first.to_dense(), name="w")[0]
    assert torch.equal(terms[0].to_dense(), first.to_dense())
    assert torch.equal(terms[1].to_dense(), residual.to_dense())


def test_a_sum_never_stores_a_value():
    delta = torch.ones(2, 2)
    terms = parse_codec("bitdelta+dense").encode(delta, name="w", tuned=delta.bfloat16())
    assert not any(term.replaces for term in terms)


def test_sums_do_not_nest():
    part = parse_codec("bitdelta")
    for parts in ((part,), (part, SumCodec((part, part))), (part, "dense")):
        with pytest.raises(CodecError, match="two or more codecs"):
            SumCodec(parts)


INPUT_FAULTS = (
    "modifies the gram of",
    "infinity on few inputs",
    "infinity on all-zero inputs",
    "all-zero delta on few inputs",
    "in the outputs on strongly correlated inputs",
)


@dataclasses.dataclass(frozen=True)
class Faulty(Codec):
    """A dense codec with one fault at a time, to see that the suite finds it."""

    name: ClassVar[str] = "faulty"
    title: ClassVar[str] = "Faulty"
    summary: ClassVar[str] = "breaks the contract"
    paper: ClassVar[str] = ""

    fault: str = ""
    seed: int = 0

    @property
    def uses_inputs(self):
        return self.fault in INPUT_FAULTS

    def encode(self, delta, *, name, tuned=None, inputs=None):
        found = delta.clone()
        tokens = -1 if inputs is None else inputs.tokens
        match self.fault:
            case "modifies the gram of" if tokens == 512:
                inputs.gram.mul_(2)
            case "infinity on few inputs" if tokens == 3:
                found = found + 3e38 + 3e38
            case "infinity on all-zero inputs" if tokens == 0:
                found = found / inputs.gram[0, 0]
            case "all-zero delta on few inputs" if tokens == 3:
                found = found + 1e-6
            case "in the outputs on strongly correlated inputs" if tokens == 512:
                found = found / 2
            case "modifies the delta":
                delta.mul_(2)
            case "not deterministic":
                found = found + torch.rand(())
            case "global random seed":
                found = found + float(torch.initial_seed() % 7)
            case "all-zero delta":
                found = found + 1
            case "another seed":
                pass
            case "changes the shape":
                found = found[:1]
            case "NaN or infinity":
                found = found + 3e38 + 3e38
            case "standard deviation 1e-08":
                found = found.half().float()
            case "standard deviation 1e.30":
                found = found.clamp(-1e4, 1e4)
            case "transposed view":
                found = found.as_strided(found.shape, (found.shape[1], 1))
            case "fine-tuned tensor alone" if tuned is not None:
                return [Dense(tuple(tuned.shape), "value", tuned + 1)]
            case "contiguous":
                return [Dense(tuple(found.shape), "delta", found.T.contiguous().T)]
        return [Dense(tuple(found.shape), "delta", found.contiguous())]


@pytest.mark.parametrize(
    "fault",
    [
        "modifies the delta",
        "not deterministic",
        "global random seed",
        "all-zero delta",
        "another seed",
        "changes the shape",
        "NaN or infinity",
        "standard deviation 1e-08",
        "standard deviation 1e.30",
        "transposed view",
        "fine-tuned tensor alone",
        "contiguous",
    ],
)
def test_the_suite_finds_each_fault(fault):
    with pytest.raises(AssertionError, match=fault):
        check_codec(Faulty(fault=fault))


@pytest.mark.parametrize("fault", INPUT_FAULTS)
def test_the_suite_finds_each_fault_with_inputs(fault):
    with pytest.raises(AssertionError, match=fault):
        check_codec(Faulty(fault=fault), seed_matters=False)


def test_the_suite_finds_a_ladder_that_goes_down():
    codecs = [parse_codec("bitdelta:bits=1"), parse_codec("bitdelta:bits=4")]
    with pytest.raises(AssertionError, match=r"takes .* bytes but the coarser step"):
        check_codec(codecs[0], ladder=codecs[::-1])
    with pytest.raises(AssertionError, match="relative error of"):
        check_codec(codecs[0], ladder=[codecs[1], parse_codec("shrink:factor=0")])


def test_spelling_of_checked_codecs_is_canonical():
    for text in {text for ladder in LADDERS for text in ladder}:
        assert spell(parse_codec(spell(parse_codec(text)))) == spell(parse_codec(text))
