"""vLLM's CPU build as a real server that answers right. `make test-vllm` runs this.

It lives in an environment of its own ($PERPLEXIT_VLLM_PYTHON is its interpreter), since it wants
an older transformers.
"""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import perplexit as px
from perplexit.errors import CapabilityError
from perplexit.inputs.token_file import TokenFile
from perplexit.sessions.completions import probe as completions_probe
from perplexit.sessions.registry import load_session

pytestmark = [pytest.mark.real_model, pytest.mark.slow]
_START_SECONDS = 400


@pytest.fixture(scope="module")
def vllm_url(real_model_dir: Path, tmp_path_factory) -> Iterator[str]:
    python = os.environ.get("PERPLEXIT_VLLM_PYTHON")
    if not python:
        pytest.skip("needs vLLM in an environment of its own: make test-vllm")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(real_model_dir)]
    command += ["--served-model-name", "smollm2", "--dtype", "float32", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", "1024", "--enforce-eager"]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    environment = {**os.environ, **quiet, "HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        _wait_until_healthy(port, server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


def _wait_until_healthy(port: int, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            pytest.fail(f"vLLM ended: {log.read_text(errors='replace')[-3000:]}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"vLLM did not start: {log.read_text(errors='replace')[-3000:]}")


@pytest.fixture(scope="module")
def tokens(real_model_dir, real_text, tmp_path_factory) -> TokenFile:
    path = tmp_path_factory.mktemp("input") / "text.safetensors"
    return px.prepare(
        [real_text[:4000]], tokenizer=str(real_model_dir), protocol="sliding",
        max_length=256, stride=128, output=path,
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(real_model_dir, tokens):
    return px.evaluate(f"hf:{real_model_dir}", tokens)


@pytest.mark.parametrize("style", ["prompt_logprobs", "echo"])
def test_vllm_gives_pytorch_s_losses(style, vllm_url, tokens, reference, monkeypatch):
    monkeypatch.setattr(completions_probe, "STYLES", (style,))
    session = load_session(f"completions:{vllm_url}#smollm2")
    run = px.evaluate(session, tokens)
    assert session.style == style
    assert session.model.max_length == 1024
    difference = np.abs(run.tokens.nll - reference.tokens.nll)
    print(f"\n{style}: max {difference.max():.2e}, mean {difference.mean():.2e} nats a token")
    assert difference.max() < 1e-3
    assert run.perplexity == pytest.approx(reference.perplexity, rel=1e-4)
    assert px.compare(reference, run).verdict in ("equivalent", "inconclusive")
    session.close()


@pytest.mark.trap(20)
def test_a_repeated_evaluation_is_the_same(vllm_url, tokens):
    """Trap 20: the second time every prompt is in vLLM's prefix cache."""
    session = load_session(f"completions:{vllm_url}")
    first, second = (px.evaluate(session, tokens) for _ in range(2))
    assert np.abs(first.tokens.nll - second.tokens.nll).max() < 1e-4
    session.close()


@pytest.mark.parametrize("style", ["prompt_logprobs", "echo"])
def test_vllm_s_alternatives_are_pytorch_s(
    style, vllm_url, tokens, real_model_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(completions_probe, "STYLES", (style,))
    session = load_session(f"completions:{vllm_url}#smollm2")
    served = px.evaluate(session, tokens, top_k=20, run=tmp_path / "served")
    own = px.evaluate(f"hf:{real_model_dir}", tokens, top_k=20, reference=tmp_path / "served")
    difference = np.abs(served.tokens.top_logprobs - own.tokens.top_logprobs)
    same = served.tokens.top_ids == own.tokens.top_ids
    print(
        f"\n{style}: max {difference.max():.2e} nats, the same id in {same.mean():.5f} of places; "
        f"KL between {own.tokens.kl.mean():.2e} and {own.tokens.kl_high.mean():.2e}"
    )
    assert difference.max() < 1e-3
    assert same.mean() > 0.999  # ties may change places
    assert (served.tokens.rank is not None) == (style == "prompt_logprobs")
    if served.tokens.rank is not None:
        assert (served.tokens.rank == own.tokens.rank).mean() > 0.999
    assert own.tokens.same_top1.mean() > 0.999
    assert own.tokens.kl.mean() < 1e-6  # the same model: the lower bound is next to 0
    with pytest.raises(CapabilityError, match="--max-logprobs"):
        px.evaluate(session, tokens, top_k=21)
    session.close()
