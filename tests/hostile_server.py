"""A completions server on loopback that does to its client whatever a test tells it to.

It speaks HTTP by hand over real sockets, since well-kept servers refuse to misbehave.
"""

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tests.markov_server import MarkovServer

KEY = "sk-secret-key-4711"


@dataclass
class Call:
    """One request, and the connection on which it waits for its answer."""

    connection: socket.socket
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    right: dict[str, Any]  # the right answer
    number: int  # of this request among those of its method, from 0

    def send(
        self,
        body: bytes | None = None,
        *,
        status: str = "200 OK",
        headers: dict[str, str] | None = None,
    ) -> None:
        """A whole reply: the right answer, unless told otherwise."""
        payload = json.dumps(self.right).encode() if body is None else body
        fields = {"Content-Type": "application/json", "Content-Length": str(len(payload))}
        self.raw(head(status, fields | (headers or {})) + payload)

    def raw(self, data: bytes) -> None:
        self.connection.sendall(data)


Behaviour = Callable[[Call], None]


def head(status: str, headers: dict[str, str], version: str = "1.1") -> bytes:
    """The status line and the headers of a reply."""
    lines = [f"HTTP/{version} {status}", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin1")


@dataclass
class HostileServer:
    """`on_post` and `on_get` answer; None answers right, as a MarkovServer of `style` does."""

    on_post: Behaviour | None = None
    on_get: Behaviour | None = None
    style: str = "prompt_logprobs"
    url: str = ""
    calls: list[Call] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.model = MarkovServer(styles=(self.style,))
        self._lock = threading.Lock()

    @property
    def num_posts(self) -> int:
        return sum(call.method == "POST" for call in self.calls)

    def serve(self, connection: socket.socket) -> None:
        """Answer the requests of one connection, until it ends."""
        with connection, suppress(OSError, ValueError), connection.makefile("rb") as stream:
            while not self.closing.is_set():
                call = self._read(connection, stream)
                if call is None:
                    return
                behave = self.on_post if call.method == "POST" else self.on_get
                (behave or Call.send)(call)

    def _read(self, connection: socket.socket, stream: Any) -> Call | None:
        line = stream.readline().decode("latin1").split()
        if len(line) != 3:
            return None
        headers: dict[str, str] = {}
        while (field_line := stream.readline().decode("latin1").strip()) != "":
            name, _, value = field_line.partition(":")
            headers[name.strip().lower()] = value.strip()
        body = json.loads(stream.read(int(headers.get("content-length", 0))) or b"{}")
        with self._lock:
            right = self._right(line[0], body)
            number = sum(call.method == line[0] for call in self.calls)
            call = Call(connection, line[0], line[1], headers, body, right, number)
            self.calls.append(call)
            if call.method == "POST":
                self.model.requests.append(body)
                self.arrived.set()
        return call

    def _right(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        if method == "POST":
            return self.model.answer(body)
        return {"object": "list", "data": [{"id": "chain", "object": "model", "owned_by": "test"}]}


@contextmanager
def hostile(server: HostileServer, tls: ssl.SSLContext | None = None) -> Iterator[HostileServer]:
    """The server on a free loopback port, for as long as the block lasts."""
    listening = socket.create_server(("127.0.0.1", 0))
    server.url = f"http{'s' if tls else ''}://127.0.0.1:{listening.getsockname()[1]}/v1"
    connections: list[socket.socket] = []

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                connections.append(connection)
                threading.Thread(target=speak, args=(connection,), daemon=True).start()

    def speak(connection: socket.socket) -> None:
        with suppress(OSError):  # a client that does not trust the certificate
            server.serve(tls.wrap_socket(connection, server_side=True) if tls else connection)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join(2)
