"""Trial changes: what a new column, option, protocol or engine costs, and that it then works.

Each trial changes a copy of the sources, at one or two places, and runs a check of the new thing
and the contract suite there.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.proofs.share import WHOLE, chosen

ROOT = Path(__file__).parent.parent.parent
SOURCES = "src/perplexit"


@dataclass(frozen=True)
class Trial:
    """A change to the sources.

    inserted: (file, anchor, lines): the lines come behind the anchor, a whole line of the file; for
        a new file the anchor is empty.
    check: a program that fails unless the new thing works. contract: sessions of the contract
        suite (`-k`) that the change can affect.
    in_tests: the same as `inserted`, in the contract suite, which a new engine joins.
    """

    name: str
    inserted: tuple[tuple[str, str, str], ...]
    check: str
    contract: str
    in_tests: tuple[tuple[str, str, str], ...] = ()


_PREPARED = """
import sys
from pathlib import Path
import numpy as np
import perplexit as px
from tests.tiny_models import save_tiny_model

folder = Path(sys.argv[1])
model = save_tiny_model("llama", folder / "model")
text = folder / "text.txt"
text.write_text("The committee met on Tuesday and discussed the budget at length. " * 20)
"""

COLUMN = Trial(
    name="a per-token column",
    inserted=(
        (
            f"{SOURCES}/token_columns.py",
            '    TokenColumn("rank", "int32", "", _DISTRIBUTION, '
            '"1 = no token was more likely", 1),',
            """    TokenColumn(
        "margin", "float32", "nats", _DISTRIBUTION, "distance to the likeliest token", 0
    ),
""",
        ),
        (
            f"{SOURCES}/functional/nll.py",
            '    columns = {"nll": nll_N, "entropy": entropy_N, "rank": rank_N}',
            """    if with_details:
        columns["margin"] = -shifted_NV.gather(1, targets_N1)[:, 0]
""",
        ),
    ),
    check=_PREPARED
    + """
run = px.evaluate(model, text, run=folder / "run", top_k=1)
margin = np.asarray(px.Run.open(folder / "run").tokens.margin)
expected = run.tokens.top_logprobs[:, 0] + run.tokens.nll
assert np.abs(margin - expected).max() < 1e-4, np.abs(margin - expected).max()
assert run.to_pandas()["margin"].min() >= 0
px.export_tokens(folder / "run", folder / "tokens.csv")
assert "margin" in (folder / "tokens.csv").read_text().partition("\\n")[0]
""",
    contract="pytorch-llama or pytorch-gemma2 or pytorch-cached-llama or onnx-logits-llama",
)

OPTION = Trial(
    name="an engine option",
    inserted=(
        (
            f"{SOURCES}/sessions/options.py",
            "    dtype: Annotated[str | None, "
            'Option("float32, bfloat16 or float16. [default: float32]")]',
            """    chunk_rows: Annotated[int | None, Option("PyTorch: rows of logits.", lowest=1)]
""",
        ),
        (
            f"{SOURCES}/sessions/pytorch/model_setup.py",
            "    chunk_rows = chunk_rows_for(opened.device, num_logits, max_logits_bytes)",
            """    chunk_rows = given["chunk_rows"] or chunk_rows
""",
        ),
    ),
    check=_PREPARED
    + """
from typer.testing import CliRunner
from perplexit.cli.app import app

run = px.evaluate(model, text, chunk_rows=3)
assert run.session["settings"]["chunk_rows"] == 3
with px.load_session(model, chunk_rows=5) as session:
    assert session.description.settings["chunk_rows"] == 5
words = ["eval", str(model), str(text), "--chunk-rows", "7", "--run", str(folder / "run")]
assert CliRunner().invoke(app, words).exit_code == 0
assert px.Run.open(folder / "run").session["settings"]["chunk_rows"] == 7
assert "rows of logits" in CliRunner().invoke(app, ["doctor", "--help"]).stdout
try:
    px.load_session("ngram:" + str(text), chunk_rows=3)
except px.CapabilityError as error:
    assert "chunk_rows" in str(error)
""",
    contract="pytorch-llama or pytorch-small-chunks-llama",
)

PROTOCOL = Trial(
    name="a protocol",
    inserted=(
        (
            f"{SOURCES}/inputs/protocol_table.py",
            "_OWN = (",
            """    Protocol(
        name="quarter",
        generate=sliding_windows,
        stride=lambda max_length: max_length // 4,
    ),
""",
        ),
    ),
    check=_PREPARED
    + """
from typer.testing import CliRunner
from perplexit.cli.app import app

words = ["prepare", str(text), "--tokenizer", str(model), "--protocol", "quarter"]
words += ["--max-length", "64", "-o", str(folder / "in.safetensors")]
result = CliRunner().invoke(app, words)
assert result.exit_code == 0, result.output
tokens = px.TokenFile.open(folder / "in.safetensors")
assert tokens.spec["protocol"]["stride"] == 16
run = px.evaluate(model, tokens)
assert run.signature.startswith("ppl|quarter.v1|len:64|stride:16|")
assert run.num_tokens == tokens.num_ids - 1
""",
    contract="pytorch-llama",
)

ENGINE = Trial(
    name="an engine",
    inserted=(
        (
            f"{SOURCES}/sessions/transitions.py",
            "",
            '''"""A Markov chain: the loss of a token follows from the token before it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from perplexit.inputs.windows import WindowIds
from perplexit.session_descriptions import ModelDescription, SessionDescription
from perplexit.sessions.base import ClosedByWith


class TransitionsInferenceSession(ClosedByWith):
    """Reads log-probabilities of V × V transitions from a `.npy` file."""

    def __init__(self, path: str) -> None:
        self._logprobs_VV = np.load(path)
        size = len(self._logprobs_VV)
        self.model = ModelDescription(f"chain:{path}", "Chain", size**2, "0" * 64, size)
        self.description = SessionDescription("chain", "1", "float64", "cpu")

    def token_nll(self, windows: Sequence[WindowIds]) -> list[NDArray[np.float32]]:
        """Return the loss of each target; see InferenceSession."""
        results = []
        for window in windows:
            before, target = window.ids_T[window.targets_N - 1], window.ids_T[window.targets_N]
            results.append(-self._logprobs_VV[before, target].astype(np.float32))
        return results

    def max_batch_size(self, window_length: int) -> int:
        """Return how many windows one call may be given."""
        return max(1, (1 << 20) // window_length)

    def close(self) -> None:
        """Release nothing: the table is small."""
''',
        ),
        (
            f"{SOURCES}/sessions/registry.py",
            "_ENGINES = {",
            '    "chain": _Engine('
            '"perplexit.sessions.transitions:TransitionsInferenceSession", "", "")'
            ",\n",
        ),
    ),
    check=_PREPARED
    + """
uniform = np.full((320, 320), -np.log(320))
np.save(folder / "table.npy", uniform)
tokens = px.prepare(text, tokenizer=model, output=folder / "in.safetensors", max_length=64)
run = px.evaluate(f"chain:{folder / 'table.npy'}", tokens, run=folder / "run")
assert abs(run.perplexity - 320) < 1e-3, run.perplexity
assert "chain-1" in run.signature
""",
    contract="chain",
    in_tests=(
        (
            "tests/contract/engines.py",
            "from tests.contract import without_weights",
            """import numpy as np
from perplexit.sessions.registry import load_session
from tests.oracles import MarkovModel


def _chain(folder: Path) -> InferenceSession:
    path = Path(tempfile.mkdtemp()) / "table.npy"
    np.save(path, MarkovModel(320).logprobs_VV.numpy())
    return load_session(f"chain:{path}")
""",
        ),
        (
            "tests/contract/engines.py",
            "ENGINES = {",
            """    "chain": Engine(
        _chain,
        ("llama",),
        oracle=lambda folder: MarkovModel(320),
        knows_weights=False,
        sees_far=False,
    ),
""",
        ),
    ),
)
TRIALS = (COLUMN, OPTION, PROTOCOL, ENGINE)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("trial", chosen(TRIALS), ids=lambda trial: trial.name)
def test_a_trial_change_costs_two_places_at_most_and_works(trial: Trial, tmp_path: Path) -> None:
    assert len(trial.inserted) <= 2
    checkout = tmp_path / "checkout"
    for name in ("src", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "proofs", "trust", "unit", "browser")
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", checkout)
    for path, anchor, lines in (*trial.inserted, *trial.in_tests):
        _insert(checkout / path, anchor, lines)
    (tmp_path / "work").mkdir()
    _run(checkout, "-c", trial.check, str(tmp_path / "work"))
    contract = "tests/contract/test_session_contract.py"
    passed = _run(
        checkout, "-m", "pytest", "-q", contract, "-k", trial.contract, "-p", "no:cacheprovider"
    )
    assert " passed" in passed
    if WHOLE:
        _run(checkout, "-m", "pytest", "-q", contract, "-p", "no:cacheprovider")


def _insert(path: Path, anchor: str, lines: str) -> None:
    """Put lines behind the one line of a file that is the anchor, or make the file."""
    if not anchor:
        assert not path.exists()
        path.write_text(lines)
        return
    text = path.read_text()
    assert text.count(f"{anchor}\n") == 1, f"{path.name} has no line {anchor}"
    path.write_text(text.replace(f"{anchor}\n", f"{anchor}\n{lines}"))


def _run(checkout: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{checkout / 'src'}{os.pathsep}{checkout}"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout
