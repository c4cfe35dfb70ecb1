"""Engine tricks: each has a name, a switch and a record; without them the losses are the same."""

import ctypes
import importlib.util
import json
import sys

import numpy as np
import pytest

from perplexit.compilation.targets import compile
from perplexit.errors import UsageError
from perplexit.resources import memory_advice
from perplexit.resources.engine_tricks import ENGINE_TRICKS, ENVIRONMENT, is_on, left_out
from perplexit.sessions.pytorch import PytorchInferenceSession
from perplexit.sessions.registry import load_session
from tests.oracles import oracle_details, random_window
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE

WINDOWS = [random_window(seed, length, VOCAB_SIZE) for seed, length in enumerate((60, 33, 2))]


def check_losses(session) -> None:
    for window, nll_N in zip(WINDOWS, session.token_nll(WINDOWS), strict=True):
        expected = oracle_details(TINY_MODELS["llama"]().eval(), window).nll_N
        assert np.abs(nll_N - expected).max() < 1e-5


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"no {module}")


def test_names_are_separated_by_commas_and_an_unknown_one_is_an_error(monkeypatch):
    assert left_out() == []
    monkeypatch.setenv(ENVIRONMENT, " window_threads,packed_linear, ")
    assert left_out() == ["packed_linear", "window_threads"]
    assert [name for name in ENGINE_TRICKS if not is_on(name)] == left_out()
    monkeypatch.setenv(ENVIRONMENT, "packed_linear,warp")
    with pytest.raises(UsageError, match=r"PERPLEXIT_WITHOUT to name .*memory_advice.*, got warp"):
        left_out()


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("packed_linear", "kernels", "plain"),
        ("window_threads", "windows_side_by_side", False),
        ("head_blocks", "head_in_blocks", False),
    ],
)
def test_each_trick_of_pytorch_is_switched_off_alone(
    tiny_llama_dir, monkeypatch, name, setting, value
):
    with_all = PytorchInferenceSession(tiny_llama_dir, threads=2).description.settings
    if with_all["kernels"] != "packed":
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setenv(ENVIRONMENT, name)
    session = PytorchInferenceSession(tiny_llama_dir, threads=2)
    settings = session.description.settings
    assert settings[setting] == value != with_all[setting]
    if name == "packed_linear":
        assert "PERPLEXIT_WITHOUT" in settings["kernels_reason"]
    else:
        assert {**settings, setting: with_all[setting]} == with_all
    check_losses(session)


@pytest.mark.parametrize("system", ["darwin", "win32", "linux without the trick"])
def test_memory_advice_does_nothing_off_linux_or_switched_off(monkeypatch, system):
    def no_c_library(_):
        raise AssertionError("the C library was asked for")

    monkeypatch.setattr(ctypes, "CDLL", no_c_library)
    if system == "linux without the trick":
        monkeypatch.setenv(ENVIRONMENT, "memory_advice")
    else:
        monkeypatch.setattr(sys, "platform", system)
    spec = importlib.util.spec_from_file_location("imported_again", memory_advice.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "imported_again", again)
    spec.loader.exec_module(again)
    again.return_freed_memory()
    assert again.MappedFiles.of_this_process().ranges == ()
    assert again.MappedFiles(((0, 1 << 40),)).forget(1 << 20, 1 << 22) == 0


def test_a_c_library_without_these_calls_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    memory_advice.return_freed_memory()
    assert memory_advice.MappedFiles.of_this_process().ranges == ()


@needs("openvino")
def test_openvino_s_graph_changes_are_switched_off_and_recorded(
    tiny_llama_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv(ENVIRONMENT, "openvino_attention,openvino_streams")
    folder = compile(tiny_llama_dir, to="openvino", output=tmp_path / "program").folder
    record = json.loads(next(folder.glob("*.json")).read_text())
    assert record["made_by"]["without"] == "openvino_attention, openvino_streams"
    session = load_session(folder, threads=2)
    assert session.description.settings["properties"]["program"]["NUM_STREAMS"] == "1"
    check_losses(session)


@needs("tvm")
def test_tvm_s_schedule_is_switched_off_and_recorded(tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "tvm_schedule")
    folder = compile(tiny_llama_dir, to="tvm", output=tmp_path / "p", max_length=64).folder
    record = json.loads(next(folder.glob("*.json")).read_text())
    assert record["made_by"]["without"] == "tvm_schedule"
    check_losses(load_session(folder))
