"""The public names: each can be had, is listed, and is typed in the stub."""

import ast
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

import pytest

import perplexit as px
from perplexit import errors

STUB = Path(px.__file__).with_suffix(".pyi")


def test_every_public_name_is_what_its_home_defines() -> None:
    for name, home in px._HOME_OF.items():
        assert getattr(px, name) is getattr(import_module(home), name)


def test_all_is_complete_and_dir_lists_it() -> None:
    assert set(px.__all__) == {"__version__", *px._HOME_OF}
    assert dir(px) == sorted(px.__all__)


def test_the_stub_names_the_same_homes() -> None:
    imported = {
        alias.name: node.module
        for node in ast.parse(STUB.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == px._HOME_OF


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'perplexity_of_everything'"):
        _ = px.perplexity_of_everything  # type: ignore[attr-defined]


def test_a_public_name_is_loaded_on_first_use_only() -> None:
    code = (
        "import sys, perplexit as px\n"
        "assert 'perplexit.resources.timer' not in sys.modules\n"
        "assert px.Timer is px.Timer\n"
        "assert 'perplexit.resources.timer' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_the_installed_one() -> None:
    assert px.__version__ == metadata.version("perplexit")


def test_every_error_is_listed_and_has_the_promised_exit_code() -> None:
    found = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PerplexitError)
    }
    assert {*found, "TrustWarning"} == {name for name in px.__all__ if hasattr(errors, name)}
    codes = {name: value.exit_code for name, value in found.items()}
    assert {name: code for name, code in codes.items() if code != 1} == {
        "UsageError": 2,
        "UnknownPrecisionError": 2,
        "GateError": 3,
    }


def test_the_package_is_typed() -> None:
    assert STUB.with_name("py.typed").exists()
