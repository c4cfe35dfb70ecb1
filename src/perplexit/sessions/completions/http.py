"""HTTP with a server that is not trusted: bounded in bytes and seconds, and bound to one address.

Nothing is sent anywhere but to the address given: no redirect is followed. A reply is read as it
comes, uncompressed, up to a number of bytes; question and reply together have a number of seconds.
The key is kept out of every message and log, also where the server repeats it.
"""

import asyncio
import ipaddress
import json
import logging
import os
import re
import threading
from collections.abc import Coroutine, Mapping
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from perplexit.errors import ModelError, UsageError

T = TypeVar("T")

KEY_VARIABLES = ("PERPLEXIT_API_KEY", "OPENAI_API_KEY")

_CONNECT_SECONDS = 30.0
_LONGEST_ERROR = 64 << 10  # bytes of an error's body that are looked at
_ERROR_SECONDS = 5.0
_LONGEST_MESSAGE = 300  # characters of a server's own words
_SHORTEST_SECRET = 4
_TRANSIENT = (408, 425, 429)
_LOGGERS = ("httpx2", "httpcore2.http11", "httpcore2.connection", "httpcore2.proxy")


class StatusError(ModelError):
    """The server answered, but with another status than 200.

    said: its own words, short and printable, without the key. retry_after: that header, unchanged.
    """

    def __init__(self, status: int, said: str, retry_after: str | None = None) -> None:
        super().__init__(f"HTTP {status}: {said}" if said else f"HTTP {status}")
        self.status = status
        self.retry_after = retry_after

    @property
    def passes(self) -> bool:
        """Return whether the same request may be answered later."""
        return self.status >= 500 or self.status in _TRANSIENT


class ConnectionFailedError(ModelError):
    """The server could not be reached, or hung up."""


class ReplyBoundError(ModelError):
    """A reply that is too long, too slow, encoded, or elsewhere; asking again would not help."""


class HttpServer:
    """One server. Its coroutines run in a thread of its own, so that Ctrl-C need not wait for it.

    The environment's proxies are used as by every HTTP client, except for a server on this
    machine's loopback interface. Certificates are verified. Cookies are neither kept nor sent.
    """

    def __init__(self, base_url: str, key: str | None) -> None:
        self.base_url = base_url
        secret = key if key and len(key) >= _SHORTEST_SECRET else None
        self._secret = re.compile(re.escape(secret), re.IGNORECASE) if secret else None
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(self._redact)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client = httpx2.AsyncClient(
            headers={"Accept": "application/json", "Accept-Encoding": "identity"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,
            verify=httpx2.create_ssl_context(),
            trust_env=not _on_loopback(base_url),
            timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
        )

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` and return its result. Ctrl-C cancels it and is raised at once."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Abort what is under way and close the connections; takes a second at most."""
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(self._redact)
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop)
            self._thread.join(1.0)

    async def reply(
        self, path: str, question: Mapping[str, Any] | None, *, largest: int, seconds: float
    ) -> bytes:
        """Return the body of the answer to a POST of `question`, or to a GET where it is None.

        largest: bytes that the body may have; seconds: that it may take, once it has begun.
        Raises StatusError, ConnectionFailedError, ReplyBoundError.
        """
        url, method = f"{self.base_url}{path}", "GET" if question is None else "POST"
        try:
            async with self._client.stream(method, url, json=question) as response:
                if response.status_code != 200:
                    raise await self._refusal(response)
                encoding = response.headers.get("content-encoding", "identity").strip().lower()
                if encoding not in ("identity", ""):
                    raise ReplyBoundError(
                        f"{self.base_url} compresses its reply ({self.printable(encoding)}) "
                        "although none was asked for; switch compression off on the server"
                    )
                async with asyncio.timeout(seconds):
                    body, whole = await _body(response, largest)
        except TimeoutError:
            raise ReplyBoundError(
                f"{self.base_url} began a reply and did not end it within {seconds:.0f} seconds"
            ) from None
        except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError) as error:
            said = self.printable(str(error)) or type(error).__name__
            raise ConnectionFailedError(f"no usable answer from {self.base_url}: {said}") from None
        if not whole:
            raise ReplyBoundError(
                f"{self.base_url} sends a reply of more than {largest:,} bytes, the most that this "
                "question can need; it was not read further"
            )
        return body

    def printable(self, text: str) -> str:
        """Return a server's words as one short line: no control characters, and never the key."""
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        line = self.without_key(line)
        return line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + "…"

    def without_key(self, text: str) -> str:
        """Return the text with the key replaced, in case the server repeated it."""
        return self._secret.sub("[the API key]", text) if self._secret else text

    def _redact(self, record: logging.LogRecord) -> bool:
        """Take the key out of a record of the HTTP libraries' logs, which show headers."""
        record.msg, record.args = self.without_key(record.getMessage()), ()
        return True

    async def _refusal(self, response: httpx2.Response) -> ModelError:
        status, headers = response.status_code, response.headers
        if 300 <= status < 400 and "location" in headers:
            return ReplyBoundError(
                f"{self.base_url} redirects (HTTP {status}) to "
                f"{self.printable(headers['location'])}; no redirect is followed, since it would "
                "send the text and the key to another address. Name that address yourself, if it "
                "is the right one"
            )
        try:
            async with asyncio.timeout(_ERROR_SECONDS):
                body, _ = await _body(response, _LONGEST_ERROR)
        except TimeoutError:
            body = b""
        encoded = "content-encoding" in headers
        said = "" if encoded else self.printable(_error_message(body))
        return StatusError(status, said, headers.get("retry-after"))

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()
        self._loop.stop()


def key_of_environment() -> str | None:
    """Return the key from the environment. Raises UsageError where no header can hold it."""
    for name in KEY_VARIABLES:
        key = os.environ.get(name, "").strip()
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise UsageError(
                f"expected printable ASCII without blanks in ${name}, got other characters; set "
                "the key alone"
            )
        if key:
            return key
    return None


def checked_url(url: str) -> str:
    """Return the address without a slash at its end, `/v1` added where it has no path.

    Raises UsageError for one that is no http(s) address, or that holds what must not be recorded.
    """
    if "@" in url or "?" in url:
        raise UsageError(
            "expected an address without a password, key or query in it: addresses are recorded. "
            f"Set {' or '.join(KEY_VARIABLES)} in the environment instead"
        )
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL):
        usable = False
    if not usable or not url.isprintable() or " " in url or "\\" in url:
        raise UsageError(
            f"expected completions:URL#MODEL with an http(s) URL, got {url!r}; for example "
            "completions:http://127.0.0.1:8000/v1#my-model"
        )
    return url.rstrip("/") if parts.path.strip("/") else url.rstrip("/") + "/v1"


async def _body(response: httpx2.Response, largest: int) -> tuple[bytes, bool]:
    """Return the body's first `largest` bytes, and whether those are all."""
    found = bytearray()
    async for piece in response.aiter_raw():
        found += piece
        if len(found) > largest:
            return bytes(found[:largest]), False
    return bytes(found), True


def _error_message(body: bytes) -> str:
    """Return the message in an error's body, in the forms that servers use; else its text."""
    text = body.decode("utf-8", "replace")
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return "a page of HTML" if text.lstrip().startswith("<") else text
    for name in ("error", "message", "detail"):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
    return value if isinstance(value, str) else text


def _on_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
