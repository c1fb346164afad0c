"""Which base vLLM serves: artifacts of another one are refused by its fingerprint."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from deltakeeper.errors import DataError
from deltakeeper.fingerprint import read_root

VARIABLE = "DELTAKEEPER_VLLM_BASE_ROOT"
PLAIN_FORMATS = ("auto", "safetensors")


def base_root(model: str, load_format: str) -> str:
    """Fingerprint of the base: what the environment says, or that of the local folder, which is read once for it.

    Args:
        model: folder or hub name that vLLM was started with.
        load_format: how vLLM has loaded it.

    Raises:
        DataError: it is no local folder that vLLM has loaded plainly, and the environment does not say it either; or
            what that says is no fingerprint.
        CheckpointError: the folder cannot be read.
    """
    told = os.environ.get(VARIABLE)
    if told is not None:
        if not re.fullmatch(r"[0-9a-f]{64}", told):
            raise DataError(f"{VARIABLE} is {told[:80]!r}; set it to the 64 hex digits of the base's fingerprint.")
        return told
    if load_format not in PLAIN_FORMATS or not Path(model).is_dir():
        raise DataError(
            f"vLLM has loaded '{model}' (load format '{load_format}'), whose fingerprint cannot be computed; start "
            f"vLLM with a local folder of safetensors, or set {VARIABLE} to the fingerprint of what it serves."
        )
    return read_root(model)


def refuse_unsupported(config: Any, device: str) -> None:
    """Stop vLLM from starting with LoRA in a way that the plugin would serve wrong or not at all.

    Args:
        config: vLLM's whole configuration.
        device: kind of the device that the model is on.

    Raises:
        DataError: names everything that stands in the way.
    """
    parallel, lora, model = config.parallel_config, config.lora_config, config.model_config
    found = {
        f"the device '{device}' (its products are for CPUs)": device != "cpu",
        "--tensor-parallel-size above 1": parallel.tensor_parallel_size > 1,
        "--pipeline-parallel-size above 1": parallel.pipeline_parallel_size > 1,
        "--fully-sharded-loras": lora.fully_sharded_loras,
        "speculative decoding": config.speculative_config is not None,
        "a quantised base": config.quant_config is not None,
        "a mixture of experts": bool(getattr(model, "is_moe", False)),
        "a multimodal model": bool(getattr(model, "is_multimodal_model", False)),
        "the second model runner": bool(getattr(config, "use_v2_model_runner", False)),
    }
    hindrances = [name for name, there in found.items() if there]
    if hindrances:
        raise DataError(
            f"deltakeeper's plugin does not know {', '.join(hindrances)}; start vLLM without that, or without the "
            "plugin (VLLM_PLUGINS= names those to load)."
        )
