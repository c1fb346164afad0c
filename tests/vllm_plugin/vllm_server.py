"""A vLLM server on loopback for tests and benchmarks, and what is asked of it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

STARTS_IN = 900
"""Seconds that a start may take on a machine that is shared."""
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        prompt: log-probabilities of the prompt's tokens but the first, empty where they were not asked for.
        tokens: the tokens that were generated.
        chances: their log-probabilities.
    """

    prompt: tuple[float, ...]
    tokens: tuple[int, ...]
    chances: tuple[float, ...]


class VllmServer:
    """One process of `vllm.entrypoints.openai.api_server` and its children, from `with` to its end."""

    def __init__(self, model: Path, log: Path, *options: str, python: str = sys.executable) -> None:
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        served = ["--model", str(model), "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(self.port)]
        lora = ["--enable-lora", "--enforce-eager"]
        # The limit of `timeout` ends the server even where its owner dies.
        self._command = [
            "timeout",
            "3000",
            python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            *served,
            *lora,
            *options,
        ]

    def __enter__(self) -> VllmServer:
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | SETTINGS, start_new_session=True
            )
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=300, trust_env=False)
        deadline = time.monotonic() + STARTS_IN
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if self.client.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(1)
        self.__exit__()
        raise RuntimeError(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")

    def __exit__(self, *rest: object) -> None:
        self.client.close()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)

    def load(self, name: str, path: Path, *, in_place: bool = False) -> httpx.Response:
        """Ask for an adapter or an artifact to be loaded."""
        asked = {"lora_name": name, "lora_path": str(path), "load_inplace": in_place}
        return self.client.post("/v1/load_lora_adapter", json=asked)

    def unload(self, name: str) -> httpx.Response:
        """Ask for a name to be forgotten."""
        return self.client.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def ask(self, model: str, prompt: list[int], tokens: int = 8, *, rated: bool = True) -> Answer:
        """Greedy tokens, and log-probabilities of them and, where it is rated, of the prompt."""
        asked = {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": 1,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if rated:
            asked["prompt_logprobs"] = 0
        answer = self.client.post("/v1/completions", json=asked)
        answer.raise_for_status()
        (choice,) = answer.json()["choices"]
        ratings = choice["prompt_logprobs"][1:] if rated else []
        return Answer(
            tuple(next(iter(rating.values()))["logprob"] for rating in ratings),
            tuple(choice["token_ids"]),
            tuple(choice["logprobs"]["token_logprobs"]),
        )

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return sum(float(value) for value in lines)

    def held_bytes(self, folder: Path) -> int:
        """Bytes that the plugin said it holds of an artifact, when it was loaded last."""
        found = re.findall(rf"{re.escape(str(folder))} read in .*; it holds (\d+) bytes", self.log.read_text())
        return int(found[-1])

    def worker_bytes(self) -> int:
        """Memory of the process that holds the model: the largest one below this server."""
        return max((_resident(pid) for pid in _descendants(self._process.pid)), default=0)


def _descendants(pid: int) -> list[int]:
    """Processes below one."""
    below = [int(word) for task in Path(f"/proc/{pid}/task").glob("*/children") for word in task.read_text().split()]
    return below + [found for child in below for found in _descendants(child)]


def _resident(pid: int) -> int:
    """Bytes of a process that are its own, not those of files that it has mapped."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 0 if found is None else int(found.group(1)) * 1024
