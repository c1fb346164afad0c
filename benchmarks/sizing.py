"""How many tenants fit into memory, from shapes and settings alone: the table of docs/deploy.md.

    python benchmarks/sizing.py

Nothing is measured here. tests/service/test_deployment.py holds the figures to what a loaded tenant really takes.
"""

from __future__ import annotations

import math

import synthetic

from deltakeeper.codecs import parse_codec

GIB = 1 << 30
MODELS = {
    "Llama-3.1-8B": synthetic.SHAPES["llama-3.1-8b"],
    "Qwen2.5-7B": synthetic.SHAPES["qwen2.5-7b"],
    "SmolLM2-135M": (49152, 576, 1536, 30, 192, True, False),
}
"""As `synthetic.SHAPES`; the last one is HuggingFaceTB/SmolLM2-135M."""
CODECS = (
    ("bitdelta", "codec"),
    ("bitdelta", "dense"),
    ("bitdelta:bits=2", "codec"),
    ("bitdelta:bits=4", "codec"),
    ("dqrelo", "codec"),
    ("delta_come", "codec"),
    ("svd:rank=16", "codec"),
    ("svd:rank=64", "codec"),
    ("rtn:bits=4", "codec"),
)
"""Codecs that lie in memory as they do on disk, and what is done with input embeddings and heads."""
_ITEM = 2
"""Bytes of a bfloat16 entry."""


def tenant_bytes(shapes: dict[str, tuple[int, ...]], codec: str, embeddings: str = "codec") -> int:
    """Bytes of memory of one loaded tenant.

    Args:
        shapes: of the model's tensors by name, as `synthetic.decoder` gives them.
        codec: its spelling.
        embeddings: `codec`, or `dense` for input embedding and head as the fine-tune has them.
    """
    found = 0
    for name, shape in shapes.items():
        if len(shape) == 1:
            found += 2 * _ITEM * shape[0]  # held once by the tenant, once in the stack that rows are gathered from
        elif embeddings == "dense" and name in ("model.embed_tokens.weight", "lm_head.weight"):
            found += _ITEM * math.prod(shape)
        else:
            size = parse_codec(codec).expected_bytes((shape[0], shape[1]))
            if size is None:
                raise ValueError(f"{codec}: shapes do not tell its size; leave it out of the table.")
            found += size
    return found


def sizing_table() -> str:
    """The table as Markdown: what a model takes by itself, then a row for each codec."""
    models = {name: synthetic.decoder(*config) for name, config in MODELS.items()}
    lines = ["| | " + " | ".join(models) + " |", "|---|" + "---:|" * len(models)]
    weights = [_ITEM * synthetic.count(shapes) for shapes in models.values()]
    cached = [2 * _ITEM * layers * narrow for _, _, _, layers, narrow, _, _ in MODELS.values()]  # bytes a token
    lines.append(_row("base in bfloat16, once", [f"{size / GIB:.2f} GiB" for size in weights]))
    lines.append(_row("tokens of context per GiB of `--kv-gib`", [f"{GIB // size:,}" for size in cached]))
    for codec, embeddings in CODECS:
        sizes = [tenant_bytes(shapes, codec, embeddings) for shapes in models.values()]
        label = f"`{codec}`" + (f", embeddings {embeddings}" if embeddings != "codec" else "")
        lines.append(_row(label, [f"{_tenants(size)} ({size / 2**20:,.0f} MiB)" for size in sizes]))
    lines.append(_row("a whole fine-tune", [f"{_tenants(size)} ({size / 2**20:,.0f} MiB)" for size in weights]))
    return "\n".join(lines) + "\n"


def _tenants(size: int) -> str:
    """Tenants per GiB: whole ones where there are several, two digits where there are few."""
    fit = GIB / size
    return f"{math.floor(fit)}" if fit >= 10 else f"{math.floor(100 * fit) / 100:.2f}"


def _row(label: str, cells: list[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print(sizing_table(), end="")
