"""E2: commands watched from outside: no look-up, no file beyond run, cache and temporary folder.

Each case is one command on one engine, under strace, with an empty home folder and nothing in the
environment that would switch telemetry or a hub off. Python's own bytecode caches are left aside.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.markov_server import MarkovServer, serving
from tests.proofs.share import chosen
from tests.proofs.watching import Watched, watched
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

PERPLEXIT = Path(sys.executable).with_name("perplexit")

# What each compiled program is made by, watched like every other command.
COMPILED = {
    "onnx": ("onnxruntime", "--to onnx"),
    "onnx-int8": ("onnxruntime", "--to onnx --quantization int8"),
    "onnx-logits": ("onnxruntime", "--to onnx --no-perplexity"),
    "openvino": ("openvino", "--to openvino"),
    "openvino-int4": ("openvino", "--to openvino --quantization int4"),
    "tvm": ("tvm", "--to tvm --max-length 64"),
    "pt2": ("torch", "--to pt2 --max-length 64"),
    "gguf": ("llama_cpp", "--to gguf"),
}
# What needs no program: the command, and the package without which it is skipped.
PLAIN = {
    "prepare": ("tokenizers", "prepare text.txt --tokenizer model --max-length 64 -o {new}"),
    "prepare-rows": ("datasets", "prepare rows.jsonl --tokenizer model --max-length 64 -o {new}"),
    "pytorch eval": ("torch", "eval model in.safetensors --run {new}"),
    "pytorch eval reference": (
        "torch",
        "eval model in.safetensors --save-reference --top-k 3 --run {new}",
    ),
    "pytorch eval cached": (
        "torch",
        "eval model in.safetensors --mode cached --prompt-len 8 --run {new}",
    ),
    "pytorch eval nf4": (
        "bitsandbytes",
        "eval model in.safetensors --quantization nf4 --run {new}",
    ),
    "pytorch eval int8": ("torchao", "eval model in.safetensors --quantization int8 --run {new}"),
    "pytorch doctor": ("torch", "doctor model in.safetensors"),
    "ngram eval": ("kenlm", "eval ngram:ids.arpa in.safetensors --run {new}"),
    "ngram doctor": ("kenlm", "doctor ngram:ids.arpa in.safetensors"),
    "recorded eval": ("pyarrow", "eval recorded:losses.jsonl in.safetensors --run {new}"),
    "recorded doctor": ("pyarrow", "doctor recorded:losses.jsonl in.safetensors"),
    "completions eval": ("httpx2", "eval completions:{url}#chain in.safetensors --run {new}"),
    "completions doctor": ("httpx2", "doctor completions:{url}#chain in.safetensors"),
    "report": ("vl_convert", "report first second -o {new}.html"),
    "compare": ("numpy", "compare first second"),
    "runs export": ("pyarrow", "runs export first -o {new}.csv"),
}
CASES = [
    *PLAIN,
    *(f"{name} compile" for name in COMPILED),
    *(f"{name} eval" for name in COMPILED),
    *(f"{name} doctor" for name in ("onnx", "openvino", "tvm", "pt2", "gguf")),
]


@dataclass
class Workshop:
    """A folder to work in, with a cache, a temporary and an empty home folder beside it."""

    base: Path
    url: str = ""
    compiled: dict[str, Watched] = field(default_factory=dict)
    number: int = 0

    def folder(self, name: str) -> Path:
        path = self.base / name
        path.mkdir(exist_ok=True)
        return path

    @property
    def work(self) -> Path:
        return self.folder("work")

    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        return kept | {
            "HOME": str(self.folder("home")),
            "TMPDIR": str(self.folder("tmp")),
            "PERPLEXIT_CACHE": str(self.folder("cache")),
            "OMP_NUM_THREADS": "1",
            "LANG": "C.UTF-8",
        }

    def run(self, command: str) -> Watched:
        """The command, watched; `{new}` in it is a path that is not there yet."""
        self.number += 1
        words = command.format(new=f"new-{self.number}", url=self.url).split()
        traces = self.folder("traces")
        done = watched(
            [PERPLEXIT, *words], cwd=self.work, environment=self.environment(), traces=traces
        )
        shutil.rmtree(traces)
        # doctor ends with 1 where it finds something to mend, in its table
        found = words[0] == "doctor" and done.returncode == 1 and "what was found" in done.stderr
        assert done.returncode == 0 or found, done.stderr
        return done

    def program(self, name: str) -> Watched:
        """What compiling the program `name` did; it is compiled once."""
        if name not in self.compiled:
            options = COMPILED[name][1]
            self.compiled[name] = self.run(f"compile model {options} -o {name}")
        return self.compiled[name]

    def address(self, name: str) -> str:
        if name != "gguf":
            return name
        return str(next((self.work / name).rglob("*.gguf")).relative_to(self.work))


def _may_watch() -> str | None:
    """Why nothing can be watched here; None where it can."""
    if shutil.which("strace") is None:
        return "needs strace: apt-get install -y strace"
    tried = subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], check=False)
    return None if tried.returncode == 0 else "strace may not trace here (a container without it)"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    reason = _may_watch()
    if reason is not None:
        pytest.skip(reason)
    shop = Workshop(tmp_path_factory.mktemp("watched"))
    save_tiny_model("llama", shop.work / "model")
    text = "Whoever measures twice and gets the same number has measured something. " * 12
    (shop.work / "text.txt").write_text(text, encoding="utf-8")
    rows = [{"text": text[start : start + 200]} for start in range(0, 600, 150)]
    (shop.work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        table = np.random.default_rng(3).standard_normal((VOCAB_SIZE, VOCAB_SIZE)) * 3
        logprobs = table - np.log(np.exp(table).sum(-1, keepdims=True))
        texts = [f"t{index}" for index in range(VOCAB_SIZE)]
        patch.setattr("tests.markov_server.TEXTS", texts)
        with serving(MarkovServer(logprobs=logprobs)) as server:
            shop.url = server.url
            _make_inputs(shop, logprobs)
            yield shop


def _make_inputs(shop: Workshop, logprobs: np.ndarray) -> None:
    """The token file, two runs, an n-gram model over ids, and recorded losses."""
    import perplexit as px  # noqa: PLC0415 - not before the workshop is known to be needed

    tokens = px.prepare(
        shop.work / "text.txt",
        tokenizer=shop.work / "model",
        output=shop.work / "in.safetensors",
        max_length=64,
    )
    for name in ("first", "second"):
        px.evaluate(f"completions:{shop.url}#chain", tokens, run=shop.work / name)
    words = ["<unk>", "<s>", "</s>", *map(str, range(VOCAB_SIZE))]
    grams = "\n".join(f"-2.5\t{word}\t-0.1" for word in words)
    (shop.work / "ids.arpa").write_text(
        f"\\data\\\nngram 1={len(words)}\nngram 2=1\n\n\\1-grams:\n{grams}\n\n"
        "\\2-grams:\n-0.3\t5 6\n\n\\end\\\n"
    )
    with (shop.work / "losses.jsonl").open("w") as file:
        for index in range(tokens.num_windows):
            ids = tokens.window_ids(index).ids_T.tolist()
            own = [None, *(float(logprobs[a, b]) for a, b in pairwise(ids))]
            file.write(json.dumps({"window": index, "ids": ids, "logprobs": own}) + "\n")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", chosen(CASES))
def test_a_command_looks_nothing_up_and_writes_nowhere_else(
    case: str, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    package = PLAIN[case][0] if case in PLAIN else COMPILED[case.partition(" ")[0]][0]
    if find_spec(package) is None:
        pytest.skip(f"needs {package}")
    done = _done(case, workshop)
    beyond = done.made_beyond(workshop.work, workshop.folder("cache"), workshop.folder("tmp"))
    beyond = [path for path in beyond if "__pycache__" not in path]
    with capsys.disabled():
        print(
            f"\n{case}: {len(done.lookups)} look-ups, {len(beyond)} files elsewhere, "
            f"{len(done.made)} files of its own"
        )
    assert done.lookups == ()
    assert beyond == []
    assert list(workshop.folder("home").iterdir()) == []
    port = int(workshop.url.rpartition(":")[2].partition("/")[0])
    assert set(done.loopback) <= ({port} if case.startswith("completions") else set())


def _done(case: str, workshop: Workshop) -> Watched:
    if case in PLAIN:
        return workshop.run(PLAIN[case][1])
    name, _, command = case.partition(" ")
    compiled = workshop.program(name)
    if command == "compile":
        return compiled
    address = workshop.address(name)
    end = " --run {new}" if command == "eval" else ""
    return workshop.run(f"{command} {address} in.safetensors{end}")


# --- the watch itself ----------------------------------------------------------------------------

_LEAKS = {
    "look-up": (
        "import socket\ntry: socket.getaddrinfo('example.invalid', 80)\nexcept OSError: pass"
    ),
    "connection": (
        "import socket; s = socket.socket(); s.settimeout(0.2)\n"
        "try: s.connect(('192.0.2.1', 80))\nexcept OSError: pass"
    ),
    "file": "import os; open(os.environ['HOME'] + '/left', 'w')",
    "folder": "import os; os.makedirs(os.environ['HOME'] + '/a/b')",
    "renamed": (
        "import os; open(os.environ['TMPDIR'] + '/x', 'w')\n"
        "os.rename(os.environ['TMPDIR'] + '/x', os.environ['HOME'] + '/left')"
    ),
    "child": "import subprocess; subprocess.run(['sh', '-c', 'echo > $HOME/left'])",
    "thread": (
        "import os, threading\n"
        "t = threading.Thread(target=lambda: open(os.environ['HOME'] + '/left', 'w'))\n"
        "t.start(); t.join()"
    ),
}


@pytest.mark.parametrize("leak", _LEAKS)
def test_what_the_watch_is_for_is_seen_by_it(leak: str, tmp_path: Path) -> None:
    reason = _may_watch()
    if reason is not None:
        pytest.skip(reason)
    shop = Workshop(tmp_path)
    done = watched(
        [sys.executable, "-c", _LEAKS[leak]],
        cwd=shop.work,
        environment=shop.environment(),
        traces=shop.folder("traces"),
    )
    beyond = done.made_beyond(shop.work, shop.folder("tmp"))
    beyond = [path for path in beyond if "__pycache__" not in path]
    if leak in ("look-up", "connection"):
        assert done.lookups
        assert not beyond
    else:
        assert any(path.startswith(str(shop.folder("home"))) for path in beyond)
        assert not done.lookups
