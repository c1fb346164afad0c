"""Norms, gates and rotations, against transformers bit for bit, on every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from deltakeeper.errors import KernelError
from deltakeeper.kernels.library import INSTRUCTION_SETS, backend
from deltakeeper.kernels.pointwise import gelu_tanh_mul, rms_norm, rotate, silu_mul

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    if backend().name == "torch":
        pytest.skip("the kernels are not compiled")
    before = torch.ops.deltakeeper.isa()
    if not torch.ops.deltakeeper.use_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    torch.ops.deltakeeper.use_isa(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 12, 64, 80, 576, 577, 1000, 2048, 8200])
@pytest.mark.parametrize(
    ("norm", "options"),
    [
        (LlamaRMSNorm, {}),
        (Gemma2RMSNorm, {"offset": 1.0, "round_first": False}),
        (GptOssRMSNorm, {"round_first": False}),
    ],
)
def test_norm_is_that_of_transformers(isa, dtype, dim, norm, options):
    generator = torch.Generator().manual_seed(dim)
    x = (torch.randn(7, dim, generator=generator) * 3).to(dtype)
    weights = torch.randn(3, dim, generator=generator).to(dtype)
    slots = torch.tensor([0, 0, 2, 1, 1, 0, 2])
    y = rms_norm(x, weights, slots, 1e-6, **options)
    for slot in range(3):
        module = norm(dim, 1e-6)
        module.weight.data = weights[slot]
        assert torch.equal(y[slots == slot], module(x[slots == slot]).detach())


def test_norm_of_strided_rows_and_of_few_columns(isa):
    x = torch.randn(5, 40)
    slots = torch.zeros(5, dtype=torch.int64)
    assert torch.equal(
        rms_norm(x[:, :24], torch.ones(1, 24), slots, 1e-5),
        rms_norm(x[:, :24].contiguous(), torch.ones(1, 24), slots, 1e-5),
    )
    few = F.rms_norm(x[:, :5], (5,), eps=1e-5)
    assert torch.allclose(rms_norm(x[:, :5], torch.ones(1, 5), slots, 1e-5), few, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_is_that_of_transformers(isa, dtype):
    for dim, heads, tokens in ((64, 9, 33), (24, 1, 2), (128, 4, 5), (6, 3, 7)):
        q, k = torch.randn(1, heads, tokens, dim).to(dtype), torch.randn(1, 3, tokens, dim).to(dtype)
        cos, sin = torch.randn(1, tokens, dim).to(dtype), torch.randn(1, tokens, dim).to(dtype)
        expected = apply_rotary_pos_emb(q, k, cos, sin)
        found = rotate(q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
        for a, b in zip(found, expected, strict=True):
            assert a.is_contiguous() and torch.equal(a, b[0].transpose(0, 1))


def test_a_partial_rotation_copies_the_rest(isa):
    q, k = torch.randn(4, 2, 20), torch.randn(4, 1, 20)
    cos, sin = torch.randn(4, 8), torch.randn(4, 8)
    turned_q, turned_k = rotate(q, k, cos, sin)
    alone_q, alone_k = rotate(q[..., :8], k[..., :8], cos, sin)
    assert torch.equal(turned_q, torch.cat([alone_q, q[..., 8:]], -1))
    assert torch.equal(turned_k, torch.cat([alone_k, k[..., 8:]], -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_is_that_of_torch_for_every_number(isa, dtype):
    gate = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype).view(64, 1024)
    up = torch.randn(64, 1024).to(dtype)
    assert torch.equal(silu_mul(gate, up).nan_to_num(7.0), (F.silu(gate) * up).nan_to_num(7.0))


def test_gelu_is_that_of_torch_but_for_a_few_last_bits(isa):
    gate = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16).view(64, 1024)
    found, expected = gelu_tanh_mul(gate, torch.ones_like(gate)), F.gelu(gate, approximate="tanh")
    other = (found != expected) & ~(found.isnan() & expected.isnan())
    assert int(other.sum()) < 60
    assert bool((gate[other] < -2.5).all())
    assert float((found[other].float() - expected[other].float()).abs().max()) < 4e-6


@pytest.mark.parametrize(
    ("gated", "exact"), [(silu_mul, F.silu), (gelu_tanh_mul, lambda x: F.gelu(x, approximate="tanh"))]
)
def test_gates_in_float32_and_of_strided_halves(isa, gated, exact):
    both = torch.randn(9, 77 * 2) * 5
    gate, up = both.chunk(2, -1)
    y = gated(gate, up)
    assert y.is_contiguous()
    assert torch.allclose(y.double(), exact(gate.double()) * up.double(), rtol=1e-6, atol=1e-5)


def test_silu_in_float32_is_within_a_few_last_places(isa):
    x = torch.linspace(-80, 80, 10_001)
    y = silu_mul(x.unsqueeze(0), torch.ones(1, len(x)))[0]
    exact = F.silu(x.double())
    assert float(((y.double() - exact) / exact).abs().nan_to_num().max()) < 4 * 2**-24


@pytest.mark.parametrize(
    "call",
    [
        lambda: rms_norm(torch.ones(2, 8), torch.ones(1, 8), torch.tensor([0, 1]), 1e-5),
        lambda: rms_norm(torch.ones(2, 8), torch.ones(1, 8), torch.tensor([0, -1]), 1e-5),
        lambda: rms_norm(torch.ones(2, 8), torch.ones(1, 9), torch.tensor([0, 0]), 1e-5),
        lambda: rms_norm(torch.ones(2, 8), torch.ones(1, 8).half(), torch.tensor([0, 0]), 1e-5),
        lambda: rms_norm(torch.ones(2, 8), torch.ones(1, 8), torch.tensor([0]), 1e-5),
        lambda: silu_mul(torch.ones(2, 8), torch.ones(2, 7)),
        lambda: gelu_tanh_mul(torch.ones(2, 8), torch.ones(2, 8).half()),
        lambda: rotate(torch.ones(2, 3, 8), torch.ones(2, 1, 8), torch.ones(2, 10), torch.ones(2, 10)),
        lambda: rotate(torch.ones(2, 3, 8), torch.ones(2, 1, 8), torch.ones(3, 8), torch.ones(3, 8)),
        lambda: rotate(torch.ones(2, 3, 8), torch.ones(2, 1, 8), torch.ones(2, 7), torch.ones(2, 7)),
        lambda: rotate(torch.ones(2, 3, 8), torch.ones(1, 1, 8), torch.ones(2, 8), torch.ones(2, 8)),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(KernelError, match="was refused"):
        call()


def test_operators_are_what_torch_expects():
    x = torch.randn(3, 16).bfloat16()
    silu_mul(x, x)  # registers
    ops = torch.ops.deltakeeper
    torch.library.opcheck(ops.rms_norm.default, (x, torch.ones(2, 16).bfloat16(), torch.tensor([0, 1, 1]), 1e-5))
    torch.library.opcheck(ops.silu_mul.default, (x, x))
    torch.library.opcheck(ops.gelu_tanh_mul.default, (x, x))
    torch.library.opcheck(
        ops.rotate.default, (torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(3, 8), torch.randn(3, 8))
    )
