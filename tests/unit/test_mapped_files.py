"""Pages of mapped files are let go of, and nothing that anybody reads changes."""

import mmap
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from perplexit.resources.memory_advice import MappedFiles
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.oracles import oracle_details, random_window

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what is mapped")
PAGE = mmap.PAGESIZE
NUM_PAGES = 64


def resident(path: Path) -> int:
    """Bytes of a file that are in this process's memory."""
    maps = psutil.Process().memory_maps(grouped=False)
    return sum(each.rss for each in maps if each.path == str(path))


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, np.ndarray]:
    path = tmp_path / "values.bin"
    values = np.random.default_rng(0).integers(0, 255, NUM_PAGES * PAGE, dtype=np.uint8)
    path.write_bytes(values.tobytes())
    return path, values


def mapped(path: Path, *, written: bool = False) -> np.ndarray:
    """The whole file, private to this process, each page touched."""
    with path.open("rb") as file:
        view = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    if written:
        view[5] += 1
    assert view.sum() > 0
    return view


def test_whole_pages_go_and_come_back_when_they_are_read(stored):
    path, values = stored
    view = mapped(path)
    assert resident(path) == NUM_PAGES * PAGE
    files = MappedFiles.of_this_process()
    # All but the first and last few bytes: their pages hold something else too.
    assert files.forget(view.ctypes.data + 10, len(view) - 20) == (NUM_PAGES - 2) * PAGE
    assert resident(path) == 2 * PAGE
    assert np.array_equal(view, values)
    assert resident(path) > 2 * PAGE


def test_a_mapping_that_was_written_to_is_left_alone(stored):
    path, values = stored
    view = mapped(path, written=True)
    assert MappedFiles.of_this_process().forget(view.ctypes.data, len(view)) == 0
    assert view[5] == values[5] + 1


def test_memory_of_no_file_is_left_alone():
    ones = np.ones(NUM_PAGES * PAGE, dtype=np.uint8)
    assert MappedFiles.of_this_process().forget(ones.ctypes.data, len(ones)) == 0
    assert ones.all()


def test_bytes_beyond_the_mapping_are_left_alone(stored):
    view = mapped(stored[0])
    files = MappedFiles.of_this_process()
    assert files.forget(view.ctypes.data + PAGE, len(view)) == 0
    assert files.forget(view.ctypes.data, PAGE - 1) == 0  # no whole page
    assert MappedFiles().forget(view.ctypes.data, len(view)) == 0


@pytest.mark.parametrize("kernels", ["packed", "plain"])
def test_packed_weights_are_in_memory_once(tmp_path, kernels):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=256, intermediate_size=1024, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    embeddings = 2 * model.get_input_embeddings().weight.nbytes
    session = PytorchInferenceSession(tmp_path, kernels=kernels)
    assert session.description.settings["kernels"] == kernels
    window = random_window(0, 100, 400)
    (nll_N,) = session.token_nll([window])
    held, whole = resident(weights), weights.stat().st_size
    session.close()
    if kernels == "packed":
        assert held < embeddings + (whole - embeddings) / 4  # pages come back in small runs
    else:
        assert held > 0.9 * whole
    assert np.abs(nll_N - oracle_details(model, window).nll_N).max() < 1e-4
