"""Passes over rows between the products of a decoder, rounded where transformers in plain torch rounds.

A row's result depends on that row alone. Norms know tenants: each row is weighted with the weight of its slot.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from deltakeeper.kernels.registration import Operator, Operators, refusal


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_slots: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    *,
    round_first: bool = True,
) -> torch.Tensor:
    """`x / √(mean(x²) + eps)`, weighted with the row's slot: `(rows, dim)` in the dtype of `x`.

    The squares are summed in the order of torch's own sum, so that with 8 or more columns the result is that of
    transformers bit for bit (checked with 5.23: `LlamaRMSNorm`, `Gemma2RMSNorm`, `GptOssRMSNorm`).

    Args:
        x: `(rows, dim)`, last dimension contiguous.
        weight: `(slots, dim)`, contiguous, of the same dtype.
        row_slots: int64 `(rows,)`.
        eps: added to the mean of the squares.
        offset: added to the weight, in float32: 1 for Gemma.
        round_first: the normalised row is rounded to the dtype before it is weighted, as Llama does; else only the
            result is, as Gemma and GPT-OSS do.

    Raises:
        KernelError: shapes or dtypes do not fit, or a slot has no weight.
    """
    try:
        y: torch.Tensor = _OPERATORS.ready()[0](x, weight, row_slots, eps, offset, round_first)
    except (RuntimeError, IndexError) as error:
        raise refusal("rms_norm", error) from error
    return y


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) · up`, the first factor rounded: `(rows, width)`, last dimensions contiguous.

    Raises:
        KernelError: the two do not have one shape and dtype.
    """
    try:
        y: torch.Tensor = _OPERATORS.ready()[1](gate, up)
    except (RuntimeError, IndexError) as error:
        raise refusal("silu_mul", error) from error
    return y


def gelu_tanh_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`gelu(gate) · up` with GELU's tanh form, the first factor rounded: `(rows, width)`, last dimensions contiguous.

    Torch's tanh and this one differ in the last bit at times: of all bfloat16 numbers 31, from -6 to -3, get another
    neighbour, by less than 4e-6; SiLU gives the same for every bfloat16 and float16 number.

    Raises:
        KernelError: the two do not have one shape and dtype.
    """
    try:
        y: torch.Tensor = _OPERATORS.ready()[2](gate, up)
    except (RuntimeError, IndexError) as error:
        raise refusal("gelu_tanh_mul", error) from error
    return y


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions of queries and keys, as `apply_rotary_pos_emb` of transformers, bit for bit.

    Args:
        q: `(tokens, heads, dim)`, of any strides whose last dimension is contiguous.
        k: `(tokens, kv_heads, dim)`, alike.
        cos: `(tokens, turned)` in the dtype of `q`, an even number up to dim; what is past it is copied.
        sin: alike.

    Returns:
        Both turned, contiguous.

    Raises:
        KernelError: shapes or dtypes do not fit.
    """
    try:
        turned_q, turned_k = _OPERATORS.ready()[3](q, k, cos, sin)
    except (RuntimeError, IndexError) as error:
        raise refusal("rotate", error) from error
    return turned_q, turned_k


def _plain_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    row_slots: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    round_first: bool = True,
) -> torch.Tensor:
    if weight.dtype != x.dtype or weight.shape[1:] != x.shape[1:] or row_slots.shape != x.shape[:1]:
        raise RuntimeError("x, the weight and the slots do not belong together")
    if row_slots.numel() and (row_slots.min() < 0 or row_slots.max() >= len(weight)):
        raise RuntimeError(f"a slot is not in a weight of {len(weight)}")
    wide = x.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if round_first:
        y = y.to(x.dtype).float()
    return (y * (weight[row_slots].float() + offset)).to(x.dtype)


def _plain_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    _check_pair(gate, up)
    return F.silu(gate) * up


def _plain_gelu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    _check_pair(gate, up)
    return F.gelu(gate, approximate="tanh") * up


def _check_pair(gate: torch.Tensor, up: torch.Tensor) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.dim() != 2:
        raise RuntimeError("gate and up must be of one shape and dtype")


def _plain_rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    turned = cos.shape[-1]
    if cos.shape != sin.shape or len(cos) != len(q) or len(k) != len(q) or turned > q.shape[-1] or turned % 2:
        raise RuntimeError("cos and sin do not fit q and k")
    if not q.dtype == k.dtype == cos.dtype == sin.dtype or q.shape[-1] != k.shape[-1]:
        raise RuntimeError("q, k, cos and sin must be of one dtype, q and k of one dim")

    def turn(x: torch.Tensor) -> torch.Tensor:
        own, rest = x[..., :turned], x[..., turned:]
        a, b = own.chunk(2, -1)
        own = own * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)
        return torch.cat((own, rest), -1)

    return turn(q), turn(k)


def _like_first(x: torch.Tensor, *others: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _like_two(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_OPERATORS = Operators(
    Operator(
        "rms_norm(Tensor x, Tensor weight, Tensor row_slots, float eps, float offset=0.0, "
        "bool round_first=True) -> Tensor",
        _plain_norm,
        _like_first,
    ),
    Operator("silu_mul(Tensor gate, Tensor up) -> Tensor", _plain_silu, _like_first),
    Operator("gelu_tanh_mul(Tensor gate, Tensor up) -> Tensor", _plain_gelu, _like_first),
    Operator("rotate(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)", _plain_rotate, _like_two),
)
