"""Where large decompositions and whole models run: on a GPU where there is one."""

from __future__ import annotations

import os

import torch

from deltakeeper.errors import DeltakeeperError


def working_device() -> torch.device:
    """The device that `DELTAKEEPER_DEVICE` names, else the first CUDA (or ROCm) device, else the CPU.

    What is packed is on the CPU in any case. Codecs of a single pass over the bytes stay there too, since the way to a
    GPU would take longer than the work.

    Raises:
        DeltakeeperError: the variable names no device that is there.
    """
    name = os.environ.get("DELTAKEEPER_DEVICE")
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeltakeeperError(f"DELTAKEEPER_DEVICE is '{name}', which is no device here; set it to cpu.") from error
    return device
