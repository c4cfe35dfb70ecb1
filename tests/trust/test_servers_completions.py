"""E1: a completions server that is hostile, over real sockets on loopback.

Each case must end in one of Perplexit's own errors, soon, with little memory, and with nothing
sent to anybody else. The right figures come from the Markov chain that the server serves.
"""

import gzip
import json
import logging
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import perplexit as px
from perplexit.errors import ModelError, PerplexitError, UsageError
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.completions import CompletionsInferenceSession
from perplexit.sessions.completions import client as client_module
from tests.hostile_server import KEY, Behaviour, Call, HostileServer, head, hostile
from tests.markov_server import VOCAB_SIZE, chain

STYLES = ("prompt_logprobs", "echo")
PERPLEXIT = Path(sys.executable).with_name("perplexit")


def _window(index: int = 0, length: int = 30) -> WindowIds:
    """Ids drawn from the chain itself, as real text is from its model."""
    rng = np.random.default_rng(index)
    ids = [0]
    while len(ids) < length:
        ids.append(int(rng.choice(VOCAB_SIZE, p=np.exp(chain()[ids[-1]]))))
    return WindowIds(index, np.array(ids, np.int32), np.arange(1, length))


def _expected(window: WindowIds) -> np.ndarray:
    return -chain()[window.ids_T[:-1], window.ids_T[1:]]


def _scored(server: HostileServer, *windows: WindowIds, **options: Any) -> list[np.ndarray]:
    """The losses that a session gets from the server."""
    session = CompletionsInferenceSession(
        f"{server.url}#chain", **{"attempts": 2, "seconds": 20.0, **options}
    )
    try:
        return session.token_nll(list(windows) or [_window()])
    finally:
        session.close()


def _refused(
    behaviour: Behaviour, match: str | None = None, *, within: float = 10.0, **options: Any
) -> tuple[PerplexitError, HostileServer]:
    """The stated error that a server's behaviour ends in."""
    style = options.pop("style", "prompt_logprobs")
    began = time.monotonic()
    with hostile(HostileServer(behaviour, style=style)) as server:
        with pytest.raises(PerplexitError, match=match) as error:
            _scored(server, **options)
        assert time.monotonic() - began < within
    return error.value, server


def _edited(edit: Callable[[dict[str, Any]], Any]) -> Behaviour:
    """The right answer, edited: in place, or replaced by what `edit` returns."""

    def behave(call: Call) -> None:
        found = edit(call.right)
        call.send(json.dumps(call.right if found is None else found).encode())

    return behave


# --- where a question goes ---------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_e1_a_redirect_sends_the_prompt_to_nobody_else(status: int) -> None:
    with hostile(HostileServer()) as other:
        target = other.url + "/completions"

        def redirect(call: Call) -> None:
            call.send(b"", status=f"{status} Moved", headers={"Location": target})

        error, server = _refused(redirect, rf"redirects \(HTTP {status}\) to {target}")
        assert "no redirect is followed" in str(error)
        assert server.num_posts == 1
        assert other.calls == []


def test_e1_a_redirect_of_the_list_of_models_is_not_followed_either() -> None:
    with hostile(HostileServer()) as other:

        def redirect(call: Call) -> None:
            call.send(b"", status="302 Found", headers={"Location": other.url + "/models"})

        with (
            hostile(HostileServer(on_get=redirect)) as server,
            pytest.raises(ModelError, match="redirects"),
        ):
            _scored(server)
        assert other.calls == []


def test_e1_sibling_a_redirect_within_the_server_is_refused_by_name_too() -> None:
    def loop(call: Call) -> None:
        call.send(b"", status="308 Permanent Redirect", headers={"Location": call.path})

    _, server = _refused(loop, "redirects .* to /v1/completions")
    assert server.num_posts == 1


def test_e1_sibling_the_environments_proxy_never_sees_what_stays_on_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with hostile(HostileServer()) as proxy, hostile(HostileServer()) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        np.testing.assert_allclose(_scored(server)[0], _expected(_window()), atol=1e-6)
        assert proxy.calls == []


def test_e1_sibling_cookies_are_not_sent_back() -> None:
    def with_cookie(call: Call) -> None:
        call.send(headers={"Set-Cookie": "who=you; Path=/"})

    with hostile(HostileServer(with_cookie, with_cookie)) as server:
        _scored(server)
    assert server.num_posts > 3
    assert not [call for call in server.calls if "cookie" in call.headers]


def test_e1_sibling_certificates_are_verified(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A certificate that nobody vouches for is refused before anything is sent."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, which makes the certificate")
    names = {"-keyout": tmp_path / "key.pem", "-out": tmp_path / "cert.pem", "-days": 2}
    names |= {"-subj": "/CN=test", "-addext": "subjectAltName=IP:127.0.0.1", "-newkey": "rsa:2048"}
    command = [
        "openssl",
        "req",
        "-x509",
        "-nodes",
        *(str(x) for pair in names.items() for x in pair),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with hostile(HostileServer(), tls) as server:
        with pytest.raises(ModelError, match="certificate verify failed"):
            _scored(server)
        assert server.calls == []
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        np.testing.assert_allclose(_scored(server)[0], _expected(_window()), atol=1e-6)


# --- bytes and seconds -------------------------------------------------------------------------


class Endless:
    """A reply of 3 GB; counts the MiB that went out before the client hung up."""

    def __init__(self, start: bytes, piece: bytes) -> None:
        self.start, self.piece, self.num_sent = start, piece, 0

    def __call__(self, call: Call) -> None:
        call.raw(self.start)
        for _ in range(3000):
            call.raw(self.piece)
            self.num_sent += 1


_MIB = b" " * (1 << 20)
_JSON = {"Content-Type": "application/json"}
_LONG = _JSON | {"Content-Length": str(7 << 30)}
ENDLESS = {
    "chunked": (
        head("200 OK", _JSON | {"Transfer-Encoding": "chunked"}),
        b"100000\r\n" + _MIB + b"\r\n",
    ),
    "length": (head("200 OK", _LONG), _MIB),
    "http-1.0": (head("200 OK", _JSON, "1.0"), _MIB),
}
_MOST_SENT = 24  # MiB: the bound is 1, the rest are the buffers of both sockets


@pytest.mark.parametrize("kind", ENDLESS)
def test_e1_a_reply_is_bounded_in_bytes(kind: str) -> None:
    reply, before = Endless(*ENDLESS[kind]), _peak_mib()
    _refused(reply, "more than 1,0.* bytes", within=15)
    assert reply.num_sent <= _MOST_SENT
    assert _peak_mib() - before < 100


@pytest.mark.parametrize("status", ["400 Bad Request", "500 Internal Server Error"])
def test_e1_the_body_of_an_error_is_bounded_in_bytes(status: str) -> None:
    reply, before = Endless(head(status, _LONG), b"x" * (1 << 20)), _peak_mib()
    _refused(reply, "HTTP [45]00", within=15)
    assert reply.num_sent <= 2 * _MOST_SENT  # 500 is asked twice
    assert _peak_mib() - before < 100


@pytest.mark.parametrize("status", ["200 OK", "500 Internal Server Error"])
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, gzip"])
def test_e1_a_compressed_reply_is_refused_unread(encoding: str, status: str) -> None:
    """A bomb of 1 MB holds 1 GB; nothing was to be compressed."""
    packed = gzip.compress if "gzip" in encoding else zlib.compress
    bomb = packed(bytes(64 << 20))

    def behave(call: Call) -> None:
        assert call.headers["accept-encoding"] == "identity"
        call.send(bomb, status=status, headers={"Content-Encoding": encoding})

    before = _peak_mib()
    _refused(behave, "compresses its reply|HTTP 500")
    assert _peak_mib() - before < 50


def _dripping(call: Call, first: bytes) -> None:
    call.raw(first)
    while True:
        call.raw(b" ")
        time.sleep(0.05)


SLOW = {
    "body": lambda call: _dripping(call, head("200 OK", _JSON | {"Content-Length": "99999"})),
    "headers": lambda call: _dripping(call, b"HTTP/1.1 200 OK\r\nX-Slow: "),
    "nothing": lambda call: time.sleep(60),
    "early-hints": lambda call: [
        (call.raw(b"HTTP/1.1 103 Early Hints\r\n\r\n"), time.sleep(0.05)) for _ in range(1200)
    ],
}


@pytest.mark.parametrize("kind", SLOW)
def test_e1_question_and_reply_are_bounded_in_total_seconds(kind: str) -> None:
    _refused(SLOW[kind], "within 2 seconds", within=8, seconds=2.0)


def test_e1_the_body_of_an_error_is_bounded_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perplexit.sessions.completions.http._ERROR_SECONDS", 0.5)
    start = head("400 Bad Request", _JSON | {"Content-Length": "99999"})
    _refused(lambda call: _dripping(call, start), "HTTP 400", within=8)


def test_e1_a_question_may_take_minutes_but_never_for_ever() -> None:
    for length in (24, 2048, 131072):
        seconds = client_module._SECONDS + client_module._SECONDS_PER_ID * length
        assert 100 < seconds < 4 * 3600
        assert client_module._REPLY_SECONDS_PER_ID * length < client_module._SECONDS_PER_ID * length
    assert client_module._REPLY_SECONDS <= 60


# --- what a reply says -------------------------------------------------------------------------

NO_LOGPROBS = {
    "false": False,
    "true": True,
    "string": "-1.5",
    "null": None,
    "list": [-1.5],
    "object": {"value": -1.5},
    "positive": 0.5,
    "huge": 10**39,
    "large": -1e30,
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", NO_LOGPROBS)
def test_e1_what_is_no_logprob_is_not_read_as_one(kind: str, style: str) -> None:
    """JSON false was read as a log-probability of 0, and 32.77 became 28.10."""

    def edit(answer: dict[str, Any]) -> None:
        choice = answer["choices"][0]
        if "prompt_logprobs" in choice:
            for entry in choice["prompt_logprobs"][5].values():
                entry["logprob"] = NO_LOGPROBS[kind]
        elif len(choice.get("logprobs", {}).get("token_logprobs", ())) > 6:
            choice["logprobs"]["token_logprobs"][5] = NO_LOGPROBS[kind]

    _refused(_edited(edit), "wrong answer to a known question", style=style)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000])
@pytest.mark.parametrize("style", STYLES)
def test_e1_numbers_that_json_or_a_float_does_not_have_are_refused(
    literal: str, style: str
) -> None:
    def behave(call: Call) -> None:
        text = json.dumps(_marked(call.right))
        call.send(text.replace('"MARK"', literal).encode())

    _refused(behave, "wrong answer to a known question", style=style)


def _marked(answer: dict[str, Any]) -> dict[str, Any]:
    choice = answer["choices"][0]
    if "prompt_logprobs" in choice:
        next(iter(choice["prompt_logprobs"][1].values()))["logprob"] = "MARK"
    elif "logprobs" in choice:
        choice["logprobs"]["token_logprobs"][-1] = "MARK"
    return answer


def _set(*path: str | int, to: Any) -> Behaviour:
    def edit(answer: Any) -> Any:
        place = answer
        for key in path[:-1]:
            place = place[key] if isinstance(place, list) or key in place else {}
        if path:
            place[path[-1]] = to
        return None if path else to

    return _edited(edit)


JUNK: dict[str, Behaviour] = {
    **{f"top {value!r}": _set(to=value) for value in ([], {}, 3, "x", True)},
    **{
        f"choices {value!r}": _set("choices", to=value)
        for value in ([], {}, None, "x", 3, [None], ["x"], [[]], [{}], [{}, {}])
    },
    **{
        f"{key} {value!r}": _set("choices", 0, key, to=value)
        for key in ("prompt_logprobs", "logprobs")
        for value in ([], "x", 3, [3], ["x"], [[1]], {"token_logprobs": 3}, {"tokens": "abc"})
    },
    "two choices": _edited(lambda a: {"choices": a["choices"] * 2}),
    "null": lambda call: call.send(b"null"),
    "empty": lambda call: call.send(b""),
    "html": lambda call: call.send(
        b"<html>Welcome to the captive portal</html>", headers={"Content-Type": "text/html"}
    ),
    "204": lambda call: call.send(b"", status="204 No Content"),
    "206": lambda call: call.send(status="206 Partial Content"),
    "418": lambda call: call.send(b'["teapot"]', status="418 I'm a teapot"),
    "truncated": lambda call: call.send(json.dumps(call.right).encode()[:-20]),
    "cut connection": lambda call: (
        call.raw(head("200 OK", _JSON | {"Content-Length": "5000"}) + b"{"),
        call.connection.shutdown(2),
    ),
    "no http": lambda call: call.raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
    "duplicate keys": lambda call: call.send(
        b'{"choices": [], ' + json.dumps(call.right).encode()[1:]
    ),
    "deep lists": lambda call: call.send(b"[" * 100_000 + b"]" * 100_000),
    "deep objects": lambda call: call.send(b'{"choices":' * 50_000 + b"1" + b"}" * 50_000),
    "no utf-8": lambda call: call.send(b'{"choices": "\xff\xfe"}'),
    "surrogate": lambda call: call.send(b'{"choices": "\\ud800"}'),
    "endless header": lambda call: call.raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000),
    "many headers": lambda call: call.raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200_000),
}


@pytest.mark.parametrize("kind", JUNK)
@pytest.mark.parametrize("style", STYLES)
def test_e1_junk_ends_in_a_stated_error(kind: str, style: str) -> None:
    if (kind, style) == ("prompt_logprobs []", "echo"):
        pytest.skip("an empty list is how a server may ignore what it does not know")
    error, _ = _refused(JUNK[kind], style=style, attempts=1, within=15)
    assert "Traceback" not in str(error)
    assert len(str(error)) < 2500


CARDS: dict[str, Any] = {
    "a list": [],
    "no data": {},
    "text": {"data": "chain"},
    "names": {"data": ["chain"]},
    "no id": {"data": [{"object": "model"}]},
    "id 3": {"data": [{"id": 3}]},
    "length text": {"data": [{"id": "chain", "max_model_len": "abc"}]},
    "length true": {"data": [{"id": "chain", "max_model_len": True}]},
    "length -5": {"data": [{"id": "chain", "max_model_len": -5}]},
    "length 0": {"data": [{"id": "chain", "max_model_len": 0}]},
    "length 1e39": {"data": [{"id": "chain", "max_model_len": 10**39}]},
    "an escape": {"data": [{"id": "chain", "owned_by": "\x1b[2J gone"}]},
    "a megabyte": {"data": [{"id": "chain", "owned_by": "x" * 900_000}]},
    "the key": {"data": [{"id": "chain", "owned_by": KEY}]},
    "another model": {"data": [{"id": f"m{i}\x1b[2J"} for i in range(5000)]},
}


@pytest.mark.parametrize("kind", CARDS)
def test_e1_sibling_junk_in_the_list_of_models_ends_in_a_stated_error(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERPLEXIT_API_KEY", KEY)

    def behave(call: Call) -> None:
        call.send(json.dumps(CARDS[kind]).encode())

    with (
        hostile(HostileServer(on_get=behave)) as server,
        pytest.raises(ModelError) as error,
    ):
        _scored(server)
    assert "\x1b" not in str(error.value)
    assert KEY not in str(error.value)
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize("style", STYLES)
def test_e1_sibling_the_replies_to_two_requests_swapped_are_refused(style: str) -> None:
    """Two windows of one length: each gets the other's numbers, all of them plausible."""
    first, second = _window(1), _window(2)
    other = {tuple(first.ids_T.tolist()): second, tuple(second.ids_T.tolist()): first}

    with hostile(HostileServer(style=style)) as server:

        def swapped(call: Call) -> None:
            window = other.get(tuple(call.body["prompt"]))
            if window is None or server.num_posts < 40:
                return call.send()
            body = call.body | {"prompt": window.ids_T.tolist()}
            return call.send(json.dumps(server.model.answer(body)).encode())

        server.on_post = swapped
        session = CompletionsInferenceSession(f"{server.url}#chain")
        for window, nll in zip([first, second], session.token_nll([first, second]), strict=True):
            np.testing.assert_allclose(nll, _expected(window), atol=1e-6)
        server.calls.extend(server.calls[-1:] * 40)
        with pytest.raises(ModelError, match=r"window 1 .*(another request|do not hold)"):
            session.token_nll([first, second])
        session.close()


@pytest.mark.parametrize("style", STYLES)
def test_e1_sibling_a_server_that_becomes_another_model_is_found(style: str) -> None:
    """The probe was answered right; then the server is restarted with other weights."""
    with hostile(HostileServer(style=style)) as server:
        session = CompletionsInferenceSession(f"{server.url}#chain")
        session.token_nll([_window(0)])
        server.model.logprobs = chain(seed=8)
        with pytest.raises(ModelError, match="to be the model that it was at the start"):
            session.token_nll([_window(1)])
        session.close()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_e1_sibling_a_right_reply_without_a_length_is_read(version: str) -> None:
    def behave(call: Call) -> None:
        call.raw(head("200 OK", _JSON | {"Connection": "close"}, version))
        call.raw(json.dumps(call.right).encode())
        call.connection.shutdown(2)

    with hostile(HostileServer(behave)) as server:
        np.testing.assert_allclose(_scored(server)[0], _expected(_window()), atol=1e-6)


# --- how often and how long --------------------------------------------------------------------


def _waits(monkeypatch: pytest.MonkeyPatch, header: str) -> tuple[list[float], HostileServer]:
    """The waits that a Retry-After leads to, without waiting; two failures, then right answers."""
    naps: list[float] = []
    real = client_module.asyncio.sleep

    async def nap(seconds: float, *rest: Any) -> None:
        if seconds:
            naps.append(seconds)
        await real(0, *rest)

    monkeypatch.setattr("asyncio.sleep", nap)

    def behave(call: Call) -> None:
        if call.number < 2:
            call.send(b"{}", status="429 Too Many", headers={"Retry-After": header})
        else:
            call.send()

    with hostile(HostileServer(behave)) as server:
        np.testing.assert_allclose(_scored(server, attempts=4)[0], _expected(_window()), atol=1e-6)
    return naps, server


_LATER = format_datetime(datetime.now(UTC) + timedelta(days=900), usegmt=True)
RETRY_AFTER = {
    "nan": (0, 30),
    "-5": (0, 0),
    "-inf": (0, 0),
    "inf": (30, 30),
    "1e999": (30, 30),
    "9" * 400: (30, 30),
    "900": (30, 30),
    "2": (2, 2),
    _LATER: (30, 30),
    "Wed, 21 Oct 2015 07:28:00 GMT": (0, 0),
    "Wed, 99 Oct 9999 99:99:99 GMT": (0, 30),
    "soon": (0, 30),
    "": (0, 30),
}


@pytest.mark.parametrize("header", RETRY_AFTER, ids=[f"case {i}" for i in range(len(RETRY_AFTER))])
def test_e1_retry_after_is_bounded(header: str, monkeypatch: pytest.MonkeyPatch) -> None:
    naps, _ = _waits(monkeypatch, header)
    low, high = RETRY_AFTER[header]
    assert all(low <= nap <= high for nap in naps)
    assert len(naps) == (2 if low else len(naps))


@pytest.mark.parametrize("status", [401, 403, 429, 500, 502, 503])
def test_e1_sibling_a_flood_of_errors_is_asked_a_bounded_number_of_times(status: int) -> None:
    def behave(call: Call) -> None:
        call.send(b"{}", status=f"{status} Flood", headers={"Retry-After": "0.01"})

    _, server = _refused(behave, f"HTTP {status}", attempts=4)
    assert server.num_posts == (1 if status < 429 else 4)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_json: Path) -> Path:
    """A token file of ids below VOCAB_SIZE: bytes 2 to 11 of the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("served")
    ids = np.concatenate([_window(index, 60).ids_T for index in range(4)])
    lines = folder / "ids.txt"
    lines.write_text("\n".join(" ".join(map(str, row)) for row in ids.reshape(4, 60)))
    px.import_id_lines(lines, output=folder / "ids.safetensors")
    return folder / "ids.safetensors"


BUSY: dict[str, Behaviour] = {
    "silent": lambda call: time.sleep(60),
    "slow": lambda call: _dripping(call, head("200 OK", _JSON | {"Content-Length": "99999"})),
    "flood": lambda call: call.send(b"{}", status="429 No", headers={"Retry-After": "30"}),
}


@pytest.mark.parametrize("kind", BUSY)
def test_e1_ctrl_c_stops_within_about_a_second(kind: str, tokens: Path, tmp_path: Path) -> None:
    """It waited for 151 seconds: for each request under way, with all its repetitions."""
    with hostile(HostileServer(BUSY[kind])) as server:
        command = [PERPLEXIT, "eval", f"completions:{server.url}#chain", tokens, "--run"]
        process = subprocess.Popen(
            [*command, tmp_path / "run"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.arrived.wait(60)
            time.sleep(0.3)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
        seconds = time.monotonic() - began
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert seconds < 5, seconds  # about 0.3 on a machine that does nothing else


# --- the key -----------------------------------------------------------------------------------

ECHOES: dict[str, Behaviour] = {
    "error": lambda call: call.send(
        json.dumps({"error": {"message": f"no such key {_key_of(call)}"}}).encode(),
        status="400 Bad Request",
    ),
    "error text": lambda call: call.send(_key_of(call).encode(), status="500 Error"),
    "escaped": lambda call: call.send(
        ('{"error": "' + "".join(f"\\u{ord(c):04x}" for c in _key_of(call)) + '"}').encode(),
        status="400 Bad Request",
    ),
    "upper case": lambda call: call.send(_key_of(call).upper().encode(), status="422 No"),
    "reason": lambda call: call.send(b"", status=f"400 {_key_of(call)}"),
    "location": lambda call: call.send(
        b"", status="307 Over There", headers={"Location": f"http://other/{_key_of(call)}"}
    ),
    "encoding": lambda call: call.send(headers={"Content-Encoding": _key_of(call)}),
    "duplicate": lambda call: call.send(
        json.dumps({_key_of(call): 1})[:-1].encode() + f', "{_key_of(call)}": 2}}'.encode()
    ),
    "constant": lambda call: call.send(json.dumps(_key_of(call)).encode()),
    "name": _edited(lambda a: {"choices": [{"prompt_logprobs": [None, {KEY: 3}]}]}),
    "no http": lambda call: call.raw(_key_of(call).encode() + b"\r\n\r\n"),
    "retry": lambda call: call.send(b"", status="503 No", headers={"Retry-After": _key_of(call)}),
    "header": lambda call: call.send(b"{}", headers={"X-Echo": _key_of(call)}),
}


def _key_of(call: Call) -> str:
    return call.headers["authorization"].removeprefix("Bearer ")


@pytest.mark.parametrize("kind", ECHOES)
@pytest.mark.parametrize("style", STYLES)
def test_e1_a_server_that_repeats_the_key_does_not_have_it_printed(
    kind: str, style: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PERPLEXIT_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    error, server = _refused(ECHOES[kind], style=style, attempts=2)
    assert server.calls[-1].headers["authorization"] == f"Bearer {KEY}"
    shown: BaseException | None = error
    while shown is not None:
        assert KEY not in f"{shown} {shown!r} {vars(shown)}"
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
    assert KEY not in caplog.text
    assert "receive_response_headers" in caplog.text


def test_e1_sibling_a_key_among_the_tokens_texts_is_hidden_and_recorded_nowhere(
    monkeypatch: pytest.MonkeyPatch, tokens: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def behave(call: Call) -> None:
        for entry in call.right["choices"][0].get("prompt_logprobs") or []:
            for number in entry or {}:
                if number == "5":
                    entry[number]["decoded_token"] = f"<{KEY}>"
        call.send()

    with hostile(HostileServer(behave)) as server:
        run = px.evaluate(f"completions:{server.url}#chain", tokens, run=tmp_path / "run")
        session = CompletionsInferenceSession(f"{server.url}#chain")
        texts = session.own_token_texts(_window().ids_T.tolist())
        assert KEY not in repr([texts, session, vars(session), session.description, run])
        assert "<[the API key]>" in texts
        session.close()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    "key", ["with blank inside", "tab\tkey-4711", "schlüssel-4711", "a\r\nX: b"]
)
def test_e1_sibling_a_key_that_no_header_can_hold_is_refused_without_it(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERPLEXIT_API_KEY", key)
    with pytest.raises(UsageError, match=r"\$PERPLEXIT_API_KEY") as error:
        CompletionsInferenceSession("http://127.0.0.1:9/v1#chain")
    assert key not in str(error.value)


def test_e1_sibling_a_key_that_ends_in_a_line_break_is_sent_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PERPLEXIT_API_KEY", KEY + "\n")
    with hostile(HostileServer()) as server:
        _scored(server)
    assert server.calls[-1].headers["authorization"] == f"Bearer {KEY}"


ADDRESSES = [
    "completions:http://user:hunter2@127.0.0.1:9/v1#m",
    "completions:http://hunter2@127.0.0.1:9/v1#m",
    "completions:http://:hunter2@127.0.0.1:9/v1#m",
    "completions:user:hunter2@127.0.0.1/v1#m",
    "completions:ftp://user:hunter2@127.0.0.1/v1#m",
    "completions:http://127.0.0.1:9/v1?key=hunter2#m",
    "completions:http://[::1#m",
    "completions:http://127.0.0.1:99999/v1#m",
    "completions:http://127.0.0.1:port/v1#m",
    "completions:http:///v1#m",
    "completions:http://a b/v1#m",
    "completions:http://a\x1b[2Jb/v1#m",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_e1_sibling_credentials_in_an_address_are_neither_printed_nor_recorded(
    address: str, tokens: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as error:
        px.evaluate(address, tokens, run=tmp_path / "run")
    assert "hunter2" not in str(error.value)
    assert "\x1b" not in str(error.value)
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()
    ]


def test_e1_the_command_line_says_it_in_one_line(tokens: Path, tmp_path: Path) -> None:
    """No traceback, exit code 1, and nothing of the key, from the outside."""
    with hostile(HostileServer(ECHOES["error"])) as server:
        done = subprocess.run(
            [PERPLEXIT, "eval", f"completions:{server.url}#chain", tokens, "--run", tmp_path / "r"],
            env={**os.environ, "PERPLEXIT_API_KEY": KEY},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert KEY not in done.stdout + done.stderr
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and KEY.encode() in f.read_bytes()]


def test_e1_sibling_closing_breaks_off_what_is_under_way() -> None:
    with hostile(HostileServer(BUSY["silent"])) as server:
        session = CompletionsInferenceSession(f"{server.url}#chain")
        ended = threading.Event()

        def ask() -> None:
            with pytest.raises(BaseException):  # noqa: B017, PT011 - whatever ends it
                session.token_nll([_window()])
            ended.set()

        threading.Thread(target=ask, daemon=True).start()
        assert server.arrived.wait(20)
        began = time.monotonic()
        session.close()
        session.close()
        assert ended.wait(5)
        assert time.monotonic() - began < 3


def _peak_mib() -> float:
    """The peak of this process's resident memory, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
