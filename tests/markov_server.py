"""A small real HTTP server with an OpenAI-compatible `/v1/completions` over a Markov chain.

Its right answers are known exactly; each fault is one that real servers have.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import numpy as np

VOCAB_SIZE = 12
TEXTS = [f"<{chr(97 + index)}>" for index in range(VOCAB_SIZE)]

FAULTS = {
    "ignores": "answers with what it generates, never with the prompt",
    "late-logits": "takes each token's log-probability from the logits after it",
    "early-targets": "gives each position the log-probability of the token after it",
    "added-bos": "puts a BOS before the prompt and scores the first id given it",
    "truncating-cache": "answers a repeated prompt with its last half only",
    "changing-cache": "answers a repeated prompt with other numbers",
    "retokenising": "decodes the ids and tokenises them again into fewer",
    "positive": "gives losses where log-probabilities belong",
    "null-inside": "gives no number at one position",
    "wrong-id": "gives another id's log-probability under that id alone",
}
ALTERNATIVES_FAULTS = {
    "shifted": "lists the alternatives of the position before",
    "fewer": "lists one alternative less than asked for",
    "other-numbers": "gives other log-probabilities when it is asked for alternatives",
    "improper": "lists probabilities that add up to more than 1",
    "texts": "names texts, which do not tell the id",
}


def chain(seed: int = 7) -> np.ndarray:
    """log p(next | previous), float64 [V, V], rows far from uniform."""
    logits = 2.0 * np.random.default_rng(seed).standard_normal((VOCAB_SIZE, VOCAB_SIZE))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@dataclass
class MarkovServer:
    """What the server does, and what it was asked."""

    styles: tuple[str, ...] = ("prompt_logprobs", "echo")
    fault: str | None = None
    fault_after: int = 0  # requests that are answered right before the fault sets in
    failures: list[tuple[int, dict[str, str]]] = field(default_factory=list)  # (status, headers)
    max_model_len: int | None = None
    extra_entries: int = 0
    max_alternatives: int = VOCAB_SIZE
    alternatives_fault: str | None = None
    tells_ranks: bool = True
    api_key: str | None = None
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    seen: set[tuple[int, ...]] = field(default_factory=set)
    logprobs: np.ndarray = field(default_factory=chain)

    def row(self, ids: list[int]) -> np.ndarray:
        """log p(next | ids), float64 [V]."""
        return self.logprobs[ids[-1]]

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = [int(index) for index in body["prompt"]]
        fault = self.fault if len(self.requests) > self.fault_after else None
        choice: dict[str, Any] = {"index": 0, "text": TEXTS[0], "finish_reason": "length"}
        following = self.row(ids)
        best = np.argsort(-following)[:5]
        generated = {TEXTS[index]: float(following[index]) for index in best}
        wants_prompt = "prompt_logprobs" in body and "prompt_logprobs" in self.styles
        wants_echo = bool(body.get("echo")) and "echo" in self.styles
        values, out = self._values(ids, fault, repeated=tuple(ids) in self.seen)
        top_k = body.get("prompt_logprobs", 0) if wants_prompt else _asked_by_echo(body)
        if top_k and self.alternatives_fault == "other-numbers":
            values = [None, *(value - 0.5 for value in values[1:] if value is not None)]
        if wants_prompt or wants_echo:
            self.seen.add(tuple(ids))
        if wants_prompt and fault != "ignores":
            choice["prompt_logprobs"] = self._entries(out, values, fault, top_k)
        elif wants_echo and fault != "ignores":
            choice["logprobs"] = {
                "token_logprobs": [*values, float(following[best[0]])],
                "tokens": [TEXTS[index] for index in out] + [TEXTS[best[0]]],
                "top_logprobs": [None] * len(values) + [generated],
            }
            if top_k:
                choice["logprobs"] |= self._echoed_alternatives(out, top_k)
        elif body.get("logprobs"):
            choice["logprobs"] = {
                "token_logprobs": [float(following[best[0]])],
                "tokens": [TEXTS[best[0]]],
                "top_logprobs": [generated],
            }
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 0,
            "model": "chain",
            "choices": [choice],
            "usage": usage,
        }

    def _values(
        self, ids: list[int], fault: str | None, *, repeated: bool
    ) -> tuple[list[float | None], list[int]]:
        pairs = list(pairwise(ids))
        values: list[float | None] = [None, *(float(self.logprobs[a, b]) for a, b in pairs)]
        if fault == "late-logits":
            values = [None, *(float(self.logprobs[b, b]) for _, b in pairs)]
        elif fault == "early-targets":
            values = [*values[1:], float(self.logprobs[ids[-1]].max())]
        elif fault == "added-bos":
            values[0] = float(self.logprobs[0, ids[0]])
        elif fault == "truncating-cache" and repeated:
            values, ids = values[len(ids) // 2 :], ids[len(ids) // 2 :]
        elif fault == "changing-cache" and repeated:
            values = [None, *(value - 0.5 for value in values[1:] if value is not None)]
        elif fault == "retokenising":
            values, ids = values[:-1], ids[:-1]
        elif fault == "positive":
            values = [None, *(-value for value in values[1:] if value is not None)]
        elif fault == "null-inside":
            values[len(values) // 2] = None
        return values, ids

    def _entries(
        self, ids: list[int], values: list[float | None], fault: str | None, top_k: int
    ) -> list[dict[str, Any] | None]:
        entries: list[dict[str, Any] | None] = []
        for position, (index, value) in enumerate(zip(ids, values, strict=True)):
            if position == 0 and value is None:
                entries.append(None)
                continue
            row = self.logprobs[ids[position - 1]]
            likelier = np.argsort(-row)[: self.extra_entries].tolist()
            entry = {
                str(i): {"logprob": float(row[i]), "decoded_token": TEXTS[i]} for i in likelier
            }
            for i, logprob in self._alternatives(ids, position, top_k).items():
                name = TEXTS[i] if self.alternatives_fault == "texts" else str(i)
                entry[name] = {"logprob": logprob, "decoded_token": TEXTS[i]}
            name = (index + 1) % VOCAB_SIZE if fault == "wrong-id" else index
            if fault == "wrong-id":
                entry = {}
            entry[str(name)] = {"logprob": value, "decoded_token": TEXTS[name]}
            if self.tells_ranks:
                entry[str(name)]["rank"] = int((row > row[name]).sum()) + 1
            entries.append(entry)
        return entries

    def _alternatives(self, ids: list[int], position: int, top_k: int) -> dict[int, float]:
        """{id: log-probability} of the most likely at a position, the least likely first."""
        before = ids[max(0, position - (2 if self.alternatives_fault == "shifted" else 1))]
        row = self.logprobs[before] + (0.7 if self.alternatives_fault == "improper" else 0.0)
        count = top_k - (1 if self.alternatives_fault == "fewer" else 0)
        return {i: float(row[i]) for i in np.argsort(-row)[:count][::-1].tolist()}

    def _echoed_alternatives(self, ids: list[int], top_k: int) -> dict[str, Any]:
        """As vLLM names ids where `return_tokens_as_token_ids` asks for it."""
        marked = "{}" if self.alternatives_fault == "texts" else "token_id:{}"
        rows: list[dict[str, float] | None] = [None]
        for position in range(1, len(ids)):
            found = self._alternatives(ids, position, top_k)
            own = {ids[position]: float(self.logprobs[ids[position - 1], ids[position]])}
            listed = found if self.alternatives_fault == "fewer" else found | own
            rows.append({marked.format(i): value for i, value in listed.items()})
        names = [marked.format(i) for i in [*ids, 0]]
        return {"tokens": names, "top_logprobs": [*rows, {}]}


def _asked_by_echo(body: dict[str, Any]) -> int:
    """How many alternatives `echo` is asked for, where it is asked to name ids."""
    named = body.get("return_tokens_as_token_ids", False)
    return int(body["logprobs"]) if named and body.get("echo") else 0


class _Handler(BaseHTTPRequestHandler):
    state: MarkovServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        card = {"id": "chain", "object": "model", "created": 0, "owned_by": "test"}
        card["max_model_len"] = self.state.max_model_len
        self._send(200, {"object": "list", "data": [card]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.state
        if state.api_key and self.headers.get("Authorization") != f"Bearer {state.api_key}":
            self._send(401, {"error": {"message": "no such key"}})
            return
        if state.failures:
            status, headers = state.failures.pop(0)
            self._send(status, {"error": {"message": "busy"}}, headers)
            return
        state.requests.append(body)
        if state.max_model_len and len(body["prompt"]) + body["max_tokens"] > state.max_model_len:
            self._send(400, {"error": {"message": "maximum context length exceeded"}})
            return
        if max(body.get("prompt_logprobs", 0), _asked_by_echo(body)) > state.max_alternatives:
            self._send(400, {"error": {"message": "more than the maximum of logprobs"}})
            return
        self._send(200, state.answer(body))

    def _send(self, status: int, record: object, headers: dict[str, str] | None = None) -> None:
        payload = json.dumps(record).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def serving(server: MarkovServer) -> Iterator[MarkovServer]:
    """The server on a free loopback port, for as long as the block lasts."""
    handler = type("Handler", (_Handler,), {"state": server})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(
        target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
