"""Real servers that answer wrong: llama.cpp's own, and llama-cpp-python's.

Seen with xllamacpp 2026.10 and llama-cpp-python 0.3.36: the first ignores `echo` and
`prompt_logprobs` without a word, the second's server takes no token ids, and its `echo` (which
other servers are built on) gives each token the log-probability of the position after it.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from perplexit.compilation.gguf_file import write_gguf
from perplexit.errors import CapabilityError, PerplexitError
from perplexit.sessions.completions import CompletionsInferenceSession
from tests.markov_server import MarkovServer, serving
from tests.oracles import oracle_details, random_window, window_of
from tests.tiny_models import VOCAB_SIZE, byte_tokenizer

_TEXT = "Whoever measures twice and gets the same number has measured something of its own."
WINDOW = random_window(0, 120, VOCAB_SIZE)


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    return write_gguf(
        tmp_path_factory.mktemp("served") / "tiny.gguf",
        config=model.config.to_dict(),
        state=model.state_dict(),
        tokenizer_json=tiny_llama_dir / "tokenizer.json",
    )


_LLAMACPP_SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.port = 256, 1, 0
params.hostnames = ["127.0.0.1"]
server = xllamacpp.Server(params)
print("LISTENING", server.listening_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def llamacpp_url(tiny_gguf: Path) -> Iterator[str]:
    pytest.importorskip("xllamacpp")
    command = [sys.executable, "-c", _LLAMACPP_SERVER, str(tiny_gguf)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        address = next((x.split()[1] for x in server.stdout if x.startswith("LISTENING")), None)
        yield f"{address}/v1"
        server.kill()


@pytest.mark.trap(39)
def test_llamacpp_s_own_server_which_ignores_echo_is_refused(llamacpp_url):
    """Trap 39: it answers with what it generates, whatever was asked of the prompt."""
    session = CompletionsInferenceSession(llamacpp_url)
    with pytest.raises(CapabilityError, match="ignores prompt_logprobs; echo: it ignores echo"):
        session.token_nll([WINDOW])
    session.close()


@pytest.fixture(scope="module")
def llama_cpp_python_url(tiny_gguf: Path) -> Iterator[str]:
    for package in ("uvicorn", "fastapi", "sse_starlette", "starlette_context"):
        pytest.importorskip(package)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"--model": tiny_gguf, "--host": "127.0.0.1", "--port": port, "--n_ctx": 256}
    options |= {"--n_threads": 1, "--logits_all": "true"}
    command = [sys.executable, "-m", "llama_cpp.server"]
    command += [str(part) for option in options.items() for part in option]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://127.0.0.1:{port}/v1/models", server)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(240):
        if server.poll() is not None:
            pytest.skip("llama-cpp-python's server does not start with these packages")
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.25)
    pytest.fail("llama-cpp-python's server did not start")


@pytest.mark.trap(39)
def test_llama_cpp_python_s_server_is_refused(llama_cpp_python_url):
    """Trap 39: a server that cannot be given ids cannot be given the question."""
    session = CompletionsInferenceSession(llama_cpp_python_url, attempts=1)
    with pytest.raises(PerplexitError, match="token-id prompts"):
        session.token_nll([WINDOW])
    session.close()


class _LlamaCppPython(MarkovServer):
    """llama-cpp-python's own completion over HTTP, handed ids in place of what it tokenises.

    Its `echo` takes text alone; what it then computes is its own code throughout.
    """

    def __init__(self, path: Path) -> None:
        import llama_cpp  # noqa: PLC0415

        super().__init__()
        self.model = llama_cpp.Llama(
            str(path), n_ctx=256, logits_all=True, type_k=0, type_v=0, n_threads=1, verbose=False
        )

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["prompt"]
        self.model.tokenize = lambda *_, **__: list(ids)
        answer = self.model.create_completion(
            prompt=self.model.detokenize(ids).decode("utf-8", "replace"),
            max_tokens=body["max_tokens"],
            temperature=0.0,
            echo=bool(body.get("echo")),
            logprobs=body.get("logprobs"),
        )
        plain: dict[str, Any] = json.loads(json.dumps(answer, default=float))
        return plain


@pytest.mark.trap(39)
def test_llama_cpp_python_s_echo_which_is_late_by_one_is_refused(tiny_gguf, tiny_llama_dir):
    """Trap 39: right in number, repeatable and causal, and yet every figure is another's."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    ids_T = np.array(byte_tokenizer().encode(_TEXT).ids, dtype=np.int32)
    window = window_of(ids_T)
    with serving(_LlamaCppPython(tiny_gguf)) as server:
        session = CompletionsInferenceSession(f"{server.url}#chain")
        with pytest.raises(CapabilityError, match="shifted by one"):
            session.token_nll([window])
        body = {"prompt": ids_T.tolist(), "max_tokens": 1, "echo": True, "logprobs": 1}
        record = server.answer(body)["choices"][0]["logprobs"]
        session.close()
    echoed = np.array(record["token_logprobs"][1 : len(ids_T)])
    assert np.abs(echoed - -oracle_details(model, window).nll_N).max() > 1
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([ids_T.tolist()])).logits[0].log_softmax(-1).numpy()
    own_T = logprobs_TV[np.arange(1, len(ids_T)), ids_T[1:]]  # p(token | ids up to itself)
    assert np.abs(echoed - own_T).max() < 1e-3
