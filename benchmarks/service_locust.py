"""Locust users of a service that runs: each asks one model after another, chats and completions, streamed and whole.

    pip install locust
    DELTAKEEPER_KEY=… locust -f benchmarks/service_locust.py --headless --host http://127.0.0.1:8000 -u 16 -r 4 -t 1m

Users ask the models that the key may ask; without keys any will do. The time to the first token and the time a token
after it are entries of their own, beside locust's entry for each route. Refusals with 429 and 503 are entries too, and
no failures: they are what a service says that is asked for too much.
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

from locust import HttpUser, between, events, task

QUESTIONS = (
    "Where is my order?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "How do I boil an egg?",
    "What is the capital of France?",
)
LONGEST = int(os.environ.get("DELTAKEEPER_TOKENS", "32"))
"""Tokens of an answer."""
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Asker(HttpUser):
    """Somebody who asks, reads, and asks again."""

    wait_time = between(0.5, 2)

    def on_start(self) -> None:
        """Say who it is, and learn what may be asked."""
        self.client.headers["Authorization"] = f"Bearer {os.environ.get('DELTAKEEPER_KEY', 'none')}"
        self.models = [card["id"] for card in self.client.get("/v1/models").json()["data"]]

    @task(4)
    def stream_a_chat(self) -> None:
        """A chat, token by token."""
        self._stream(_CHAT, {"messages": [{"role": "user", "content": random.choice(QUESTIONS)}]})

    @task(2)
    def chat(self) -> None:
        """A chat in one piece."""
        self._whole(_CHAT, {"messages": [{"role": "user", "content": random.choice(QUESTIONS)}]})

    @task(2)
    def stream_a_completion(self) -> None:
        """A completion, token by token."""
        self._stream(_COMPLETIONS, {"prompt": random.choice(QUESTIONS)})

    @task(1)
    def complete(self) -> None:
        """A completion in one piece."""
        self._whole(_COMPLETIONS, {"prompt": random.choice(QUESTIONS)})

    def _body(self, question: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"model": random.choice(self.models), "max_tokens": LONGEST, "temperature": 0, **question, **more}

    def _whole(self, path: str, question: dict[str, Any]) -> None:
        with self.client.post(path, json=self._body(question), catch_response=True) as answer:
            if answer.status_code in (429, 503):
                answer.request_meta["name"] = f"{path} refused {answer.status_code}"
                answer.success()

    def _stream(self, path: str, question: dict[str, Any]) -> None:
        body = self._body(question, stream=True, stream_options={"include_usage": True})
        sent, first, tokens, ended = time.perf_counter(), 0.0, 0, False
        name = f"{path} streamed"
        with self.client.post(path, json=body, stream=True, name=name, catch_response=True) as answer:
            if answer.status_code in (429, 503):
                answer.request_meta["name"] = f"{path} refused {answer.status_code}"
                answer.success()
                return
            for line in answer.iter_lines():
                if not line.startswith(b"data: "):
                    continue
                if line == b"data: [DONE]":
                    ended = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    answer.failure(event["error"]["message"])
                    return
                if not first and any(_text(choice) for choice in event["choices"]):
                    first = time.perf_counter()
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            if not ended and answer.status_code == 200:
                answer.failure("the stream has no end")
        if first:
            _note("first token", first - sent)
        if first and tokens > 1:
            _note("a further token", (time.perf_counter() - first) / (tokens - 1))


def _text(choice: dict[str, Any]) -> str:
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


def _note(name: str, seconds: float) -> None:
    events.request.fire(
        request_type="SSE", name=name, response_time=1000 * seconds, response_length=0, exception=None, context={}
    )
