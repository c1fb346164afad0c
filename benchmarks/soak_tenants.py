"""A tiny base that speaks and many fine-tunes of it that say different things, for a soak on one core."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from deltakeeper import compress
from deltakeeper.artifact import open_artifact
from deltakeeper.testing import write_pair, write_tokenizer

CONTEXT = 512
CODECS = ("bitdelta", "bitdelta:bits=2", "svd:rank=8", "rtn:bits=4")
SPREAD = 0.05
"""Standard deviation of the differences; the base's weights have 0.02, so that fine-tunes really differ."""
TEMPLATE = "{% for m in messages %}w0 {{ m['content'] }} w1 {% endfor %}{% if add_generation_prompt %}w2{% endif %}"
BARRED = "barred"
"""An artifact that policy keeps out."""
CANARY = ("w5 w6 w7", "w8 w9", "w10 w11 w12 w13", "w14")
POLICY = """\
codecs: [bitdelta, svd, rtn]
canary: {prompts: canary.jsonl, count: 4, new_tokens: 8, drop_at_most: 1.0, broken_at_most: 1.0}
"""


def write_tenants(folder: Path, count: int) -> list[str]:
    """Write `base`, `deltas` and `policy.yaml` into an empty folder; gives the names of the tenants."""
    base, tuned = write_pair("llama", folder, dtype=torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT  # room for answers that are cut off half-way
    for path in (base, tuned):
        (path / "config.json").write_text(json.dumps(config))
        write_tokenizer(path)
        (path / "chat_template.jinja").write_text(TEMPLATE)
    weights = load_file(base / "model.safetensors")
    names = [f"t{number:02d}" for number in range(count)]
    for number, name in enumerate(names):
        _write_tuned(weights, tuned, number)
        compress(base, tuned, folder / "deltas" / name, CODECS[number % len(CODECS)])
    compress(base, tuned, folder / "deltas" / BARRED, "magnitude")
    shutil.rmtree(tuned)
    (folder / "policy.yaml").write_text(POLICY)
    (folder / "canary.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in CANARY))
    return names


def payload_bytes(folder: Path, names: list[str]) -> int:
    """Bytes of the tenants' artifacts together."""
    return sum(open_artifact(folder / "deltas" / name).nbytes for name in names)


def _write_tuned(weights: dict[str, torch.Tensor], folder: Path, seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    tuned = {
        name: (weight.float() + SPREAD * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
        for name, weight in weights.items()
    }
    save_file(tuned, folder / "model.safetensors", metadata={"format": "pt"})
