"""The noise floor: the model against itself in other batches, recorded, and used by the verdict."""

from pathlib import Path

import numpy as np
import pytest

import perplexit as px
from perplexit.inputs.token_file import TokenFile
from tests.toy_sessions import BigramSession
from tests.unseen_text import DOCUMENTS


class ShapeDependentSession(BigramSession):
    """A model whose losses depend on how many windows a batch has, as dynamic int8 does."""

    def __init__(self, *, seed: int = 0, shift: float) -> None:
        super().__init__(seed=seed)
        self._shift = shift

    def token_nll(self, windows: list) -> list[np.ndarray]:
        return [
            nll + np.float32(self._shift * (len(windows) == 1))
            for nll in super().token_nll(windows)
        ]


@pytest.fixture(scope="module")
def tokens(byte_tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    output = tmp_path_factory.mktemp("input") / "in.safetensors"
    return px.prepare(DOCUMENTS, tokenizer=byte_tokenizer_json, max_length=24, output=output)


def test_it_is_how_far_other_batches_move_the_mean(tokens: TokenFile, tmp_path: Path) -> None:
    session = ShapeDependentSession(shift=0.02)
    run = px.evaluate(session, tokens, batch_size=4, measure_noise_floor=True, run=tmp_path / "a")
    assert run.noise_floor["batch_size"] == 1
    assert run.noise_floor["mean"] == pytest.approx(0.02, abs=1e-6)
    assert run.noise_floor["nats_a_token"] == pytest.approx(0.02, abs=1e-4)
    assert px.Run.open(tmp_path / "a").noise_floor == run.noise_floor
    alone = px.evaluate(session, tokens, batch_size=1, measure_noise_floor=True)
    assert alone.noise_floor["batch_size"] == 2
    # the windows that are scored in pairs lack the shift; a last one alone has it still
    assert alone.noise_floor["mean"] == pytest.approx(-0.02, abs=1e-3)


def test_a_session_that_does_not_care_has_none(tokens: TokenFile) -> None:
    run = px.evaluate(BigramSession(seed=0), tokens, batch_size=3, measure_noise_floor=True)
    assert run.noise_floor["nats_a_token"] == 0
    assert run.noise_floor["num_windows"] <= 32


def test_the_verdict_uses_it(tokens: TokenFile) -> None:
    def pair(*, measured: bool) -> list[px.Run]:
        return [
            px.evaluate(session, tokens, batch_size=size, measure_noise_floor=measured)
            for session, size in (
                (ShapeDependentSession(shift=0.02), 4),
                (ShapeDependentSession(shift=0.02), 1),
            )
        ]

    without = px.compare(*pair(measured=False))
    assert without.verdict == "worse"  # the same model: only the batches differ
    assert without.margin == 1e-5
    found = px.compare(*pair(measured=True))
    assert found.verdict == "equivalent"
    assert found.margin == pytest.approx(0.02, abs=1e-3)
    assert found.noise_floor["reference"] == pytest.approx(0.02, abs=1e-4)
    assert px.compare(*pair(measured=True), noise_floor=0.5).margin == 0.5


def test_a_complete_run_is_measured_when_it_is_asked_for_later(
    tokens: TokenFile, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    session = ShapeDependentSession(shift=0.02)
    assert px.evaluate(session, tokens, batch_size=4, run=folder).noise_floor is None
    later = px.evaluate(session, tokens, batch_size=4, run=folder, measure_noise_floor=True)
    assert later.noise_floor["mean"] == pytest.approx(0.02, abs=1e-6)
    assert px.Run.open(folder).noise_floor == later.noise_floor


def test_a_real_network_has_a_small_one(tiny_llama_dir: Path, tmp_path: Path) -> None:
    tokens = px.prepare(
        DOCUMENTS, tokenizer=tiny_llama_dir, max_length=24, output=tmp_path / "in.safetensors"
    )
    run = px.evaluate(tiny_llama_dir, tokens, batch_size=4, measure_noise_floor=True)
    assert 0 <= run.noise_floor["nats_a_token"] < 1e-6
