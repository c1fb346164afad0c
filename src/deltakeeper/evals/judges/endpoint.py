"""One OpenAI-compatible endpoint over HTTP: bounded, retried, and on this machine unless the user says otherwise."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from deltakeeper.errors import DataError
from deltakeeper.loopback import is_loopback

MAX_RESPONSE = 1 << 20
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 30.0


class Refused(Exception):  # noqa: N818 - a turn of the conversation, not a fault
    """The endpoint does not accept the request as it is (HTTP status 400 or 422)."""


class _Passing(Exception):  # noqa: N818
    """A fault that may be gone at the next attempt; `wait` is what the endpoint asked for, in seconds."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class Unreadable(Exception):  # noqa: N818
    """The endpoint answered with something that is no chat completion."""


def check_address(base_url: str, allow_remote: bool, has_key: bool) -> str:
    """A base URL without its final slash.

    Raises:
        ValueError: it is no plain http(s) URL, not on this machine although `allow_remote` is false, or would carry a
            key over the network in the clear.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("it must be a URL such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise ValueError("it must not hold a user or a password; give the key by api_key_env")
    if not is_loopback(parts.hostname):
        if not allow_remote:
            raise ValueError("answers would leave this machine; set allow_remote: true to allow that")
        if has_key and parts.scheme != "https":
            raise ValueError("it would carry the key in the clear; use https")
    return base_url.rstrip("/")


class Endpoint:
    """Calls `POST {base_url}/chat/completions`.

    The key is read from the environment at each call, so that no object holds it, and no message repeats what the
    endpoint says, which may quote it. Redirects are not followed and proxies of the environment are not used: both
    could carry answers off this machine.

    Args:
        base_url: address, as `check_address` gives it.
        api_key_env: name of the environment variable with the key; None sends none.
        timeout: seconds that one attempt may take in all.
        retries: further attempts after a timeout, a broken connection, or a status of 408, 429 or 5xx.
        sleep: for tests.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 2,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.base_url = base_url
        self.api_key_env = api_key_env
        self.timeout = timeout
        self.retries = retries
        self._sleep = sleep
        self._jitter = random.Random(0)
        self._client: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: all but the open connections."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_client", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _client=None, _lock=threading.Lock())

    def check_key(self) -> None:
        """Raises DataError if a key is wanted and the environment holds none."""
        self._headers()

    def complete(self, body: Mapping[str, Any]) -> str:
        """The text of the first choice; may be called from several threads.

        Raises:
            DataError: the endpoint cannot be reached or refuses for good.
            Refused: it does not take this body.
            Unreadable: what it says is no chat completion, attempt after attempt.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._attempt(body)
            except (_Passing, Unreadable) as fault:
                if attempt == self.retries:
                    if isinstance(fault, Unreadable):
                        raise
                    raise DataError(
                        f"the judge at {self.base_url} failed {attempt + 1} times, at last with {fault}; "
                        "check that it runs, or raise timeout and retries."
                    ) from None
                wait = fault.wait if isinstance(fault, _Passing) else None
                self._sleep(min(_LONGEST_WAIT, wait if wait is not None else self._backoff(attempt)))
        raise AssertionError("unreachable")  # the last attempt returns or raises

    def close(self) -> None:
        """Drop open connections."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _backoff(self, attempt: int) -> float:
        return _FIRST_WAIT * 2.0**attempt * (1 + self._jitter.random() / 2)

    def _attempt(self, body: Mapping[str, Any]) -> str:
        import httpx

        ends = time.monotonic() + self.timeout
        content = b""
        try:
            with self._opened().stream(
                "POST", f"{self.base_url}/chat/completions", json=body, headers=self._headers()
            ) as response:
                self._check_status(response.status_code, response.headers.get("retry-after"))
                for part in response.iter_raw():
                    content += part
                    if len(content) > MAX_RESPONSE:
                        raise Unreadable("a response larger than any verdict")
                    if time.monotonic() > ends:
                        raise _Passing("no whole response in time")
        except httpx.TimeoutException:
            raise _Passing("no response in time") from None
        except httpx.HTTPError as error:
            raise _Passing(f"a broken connection ({type(error).__name__})") from None
        return _text_of(content)

    def _check_status(self, status: int, retry_after: str | None) -> None:
        if status in (408, 429) or status >= 500:
            wait = float(retry_after) if retry_after is not None and retry_after.isdecimal() else None
            raise _Passing(f"HTTP status {status}", wait)
        if status in (400, 422):
            raise Refused
        if status != 200:
            hint = "set the key that api_key_env names" if status in (401, 403) else "check base_url and model"
            raise DataError(f"the judge at {self.base_url} answers with HTTP status {status}; {hint}.")

    def _headers(self) -> dict[str, str]:
        plain = {"Accept-Encoding": "identity"}  # a few packed bytes could otherwise unfold into very many
        if self.api_key_env is None:
            return plain
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise DataError(f"the judge at {self.base_url} needs a key; set {self.api_key_env} in the environment.")
        return {**plain, "Authorization": f"Bearer {key}"}

    def _opened(self) -> Any:
        with self._lock:
            if self._client is None:
                import httpx

                self._client = httpx.Client(timeout=self.timeout, follow_redirects=False, trust_env=False)
            return self._client


def _text_of(content: bytes) -> str:
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError) as error:
        raise Unreadable("no chat completion") from error
    if not isinstance(text, str):
        raise Unreadable("no text")
    return text
