"""bench/: its arithmetic, and that every contender scores the same tokens to the same losses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from perplexit.resources.host_memory import HostMemory
from tests.resident import mapped

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import run as bench_run  # noqa: E402 - scripts beside the package
from sidebyside import (  # noqa: E402
    aims,
    contenders,
    growth,
    growth_plot,
    pages,
    sections,
    tables,
    worker,
)
from sidebyside.contenders import Scored, Setting  # noqa: E402
from sidebyside.figures import (  # noqa: E402
    ForwardFlops,
    Spread,
    attention_flops,
    growth_exponent,
    product_flops,
    share_of_ceiling,
    times_faster,
    tokens_per_second,
    turns,
)
from sidebyside.workloads import Workload, token_file_of  # noqa: E402

WINDOW, NUM_WINDOWS = 40, 3


# --- arithmetic --------------------------------------------------------------------------------


def test_turns_alternate() -> None:
    assert list(turns("abc", 2)) == [(0, "a"), (0, "b"), (0, "c"), (1, "a"), (1, "b"), (1, "c")]


def test_spread_is_the_median_between_the_extremes() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 9.0, 4.0]) == Spread(3.0, 1.0, 9.0)
    assert f"{Spread.of([1.0, 2.0, 4.0]):.1f}" == "2.0 (1.0–4.0)"
    assert f"{Spread.of([1.0]):.1f}" == "1.0"
    with pytest.raises(ValueError, match="at least one value"):
        Spread.of([])


def test_ratios_are_taken_round_by_round() -> None:
    """The machine slows down by ten in the second round; the ratio stays 2."""
    assert times_faster([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == Spread(2.0, 2.0, 2.0)
    # three times the tokens in twice the time is 1.5 times the rate
    assert times_faster([1.0], [2.0], base_tokens=10, tokens=30).median == pytest.approx(1.5)
    assert tokens_per_second([1.0, 2.0, 4.0], 100).median == 50
    with pytest.raises(ValueError, match="zip"):
        times_faster([1.0], [1.0, 2.0])


def test_flops() -> None:
    assert product_flops([(2, 3), (3, 5)], 7) == 2 * 7 * (6 + 15)
    # window of 3 ids: 1 + 2 + 3 pairs, two products of width multiply-adds each
    assert attention_flops([3], num_layers=2, width=8) == 2 * (1 + 2 + 3) * 2 * 8 * 2


def test_share_of_the_ceiling() -> None:
    flops = ForwardFlops(products=100.0, attention=20.0)
    alone, with_attention = share_of_ceiling([3.0, 3.0], [4.0, 6.0], flops)
    assert alone.high == pytest.approx(0.75)
    assert with_attention.high == pytest.approx(0.9)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_growth_exponent(exponent: float) -> None:
    sizes = [128, 256, 512, 1024]
    costs = [7 * size**exponent for size in sizes]
    assert growth_exponent(sizes, costs) == pytest.approx(exponent)


# --- what is scored ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ids_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(2, 320, 400).astype(np.int32))
    return path


def test_windows_share_one_id_and_score_each_id_once(ids_file: Path, tmp_path: Path) -> None:
    workload = Workload.of_windows(ids_file, NUM_WINDOWS, WINDOW)
    windows = workload.windows()
    assert [len(window) for window in windows] == [WINDOW] * NUM_WINDOWS
    targets = np.concatenate([window[1:] for window in windows])
    assert targets.tolist() == workload.text_ids[1:].tolist()
    tokens = token_file_of(workload, tmp_path / "in.safetensors")
    assert tokens.num_targets == workload.num_targets == NUM_WINDOWS * (WINDOW - 1)
    assert workload.fed_lengths() == [WINDOW - 1] * NUM_WINDOWS


def test_strided_windows_are_those_of_the_protocol(ids_file: Path, tmp_path: Path) -> None:
    workload = Workload(str(ids_file), 100, WINDOW, WINDOW // 2)
    tokens = token_file_of(workload, tmp_path / "in.safetensors")
    expected = [(w.start, w.stop, w.stop - w.target_start) for w in tokens.windows]
    found = workload.strided()
    assert [(b, e) for b, e, _ in found] == [(b, e) for b, e, _ in expected]
    assert [new for _, _, new in found[1:]] == [new for _, _, new in expected[1:]]
    assert sum(new for _, _, new in found) - 1 == tokens.num_targets == 99


# --- every contender on one tiny model ---------------------------------------------------------


@pytest.fixture(scope="module")
def opened(
    tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], contenders.Contender]:
    scratch = str(tmp_path_factory.mktemp("scratch"))

    def of(name: str) -> contenders.Contender:
        program = None
        if name == "llama.cpp":
            pytest.importorskip("llama_cpp")
            from sidebyside.building import compiled  # noqa: PLC0415 - imports torch

            program = str(compiled(tiny_llama_dir, Path(scratch) / "gguf", "gguf", None))
        setting = Setting(str(tiny_llama_dir), "float32", 1, scratch, program)
        return contenders.open_contender(name, setting)

    return of


@pytest.fixture(scope="module")
def ours(opened: Callable[[str], contenders.Contender], ids_file: Path) -> Scored:
    return opened("perplexit").prepare(Workload.of_windows(ids_file, NUM_WINDOWS, WINDOW))()


@pytest.mark.parametrize(
    "name",
    [
        "perplexit nll",
        "perplexit cached, 128 a call",
        "perplexit cached, 64 windows",
        "plain loop",
        "hf evaluate",
        "mlc's hf loop",
        "lm-eval",
        "llama.cpp",
        "one token a call",
    ],
)
def test_contenders_score_the_same(
    name: str, opened: Callable[[str], contenders.Contender], ids_file: Path, ours: Scored
) -> None:
    workload = Workload.of_windows(ids_file, NUM_WINDOWS, WINDOW)
    found = opened(name).prepare(workload)()
    assert found.num_tokens == ours.num_tokens == workload.num_targets
    assert found.nll_sum == pytest.approx(ours.nll_sum, rel=1e-5)
    if found.nll is not None and ours.nll is not None:
        assert found.nll == pytest.approx(ours.nll, abs=1e-4)


def test_the_guides_loop_gives_the_guides_number(
    opened: Callable[[str], contenders.Contender], ids_file: Path
) -> None:
    workload = Workload(str(ids_file), 100, WINDOW, WINDOW // 2)
    theirs, mine = (opened(name).prepare(workload)() for name in ("hf guide", "perplexit"))
    assert theirs.nll_sum == pytest.approx(mine.nll_sum, rel=1e-5)
    assert theirs.own_perplexity == pytest.approx(mine.own_perplexity, rel=1e-5)
    assert theirs.own_perplexity != pytest.approx(
        np.exp(theirs.nll_sum / theirs.num_tokens), rel=1e-6
    )


def test_long_windows_are_decoded_at_sampled_positions(
    opened: Callable[[str], contenders.Contender], ids_file: Path
) -> None:
    workload = Workload(str(ids_file), 300, 257)
    loop = opened("one token a call").prepare(workload)()
    together = opened("perplexit cached, 64 windows").prepare(workload)()
    assert together.num_tokens == 64 * loop.num_tokens
    assert (loop.seconds or 0) > 0
    assert (together.seconds or 0) > 0


@pytest.mark.parametrize("family", ["tiny_llama_dir", "tiny_gpt2_dir"])
def test_the_ceiling_is_all_the_models_products(
    family: str, ids_file: Path, request: pytest.FixtureRequest
) -> None:
    """Two operations a weight and row, counted from the checkpoint without embeddings."""
    from sidebyside.gemm import GemmCeiling  # noqa: PLC0415 - imports torch

    folder = request.getfixturevalue(family)
    ceiling = GemmCeiling(Setting(str(folder), "float32", 1, ""))
    workload = Workload.of_windows(ids_file, 2, WINDOW)
    matrices = {
        name: parameter.numel()
        for name, parameter in ceiling.model.named_parameters()
        if parameter.dim() == 2 and not any(part in name for part in ("wte", "wpe", "embed"))
    }
    head = 320 * 32
    body = sum(matrices.values()) - matrices.get("lm_head.weight", 0)
    rows = 2 * (WINDOW - 1)
    assert ceiling.flops(workload).products == 2 * rows * (body + head)
    scored = ceiling.prepare(workload)()
    assert scored.nll_sum is None
    assert (scored.seconds or 0) > 0


# --- sections, tables, the command -------------------------------------------------------------


def test_sections_have_known_contenders_and_their_base() -> None:
    found = list(sections.sections({"demo": Path(), "gpt2": Path()}, (512, 1024, 2048)))
    names = [section.name for section in found]
    assert len(set(names)) == len(names)
    assert "gpt2-fp32-2048" not in names  # it has 1024 positions
    for section in found:
        assert section.windows >= 2  # one a thread
        assert set(section.contenders) <= contenders.CONTENDERS.keys()
        assert {section.base, section.reference} <= set(section.contenders)
    ordered = sorted(names, key=sections.section_order)
    assert ordered[:4] == ["demo-fp32-512", "demo-fp32-1024", "demo-fp32-2048", "demo-bf16-512"]


RECORD: dict[str, Any] = {
    "base": "plain loop",
    "flops": {"products": 100.0, "attention": 10.0},
    "contenders": {
        "perplexit": {
            "seconds": [1.0, 2.0],
            "num_tokens": 10,
            "memory": {"peak_bytes": 2**20, "nll_sum": 10.0, "num_tokens": 10},
        },
        "plain loop": {
            "seconds": [1.2, 2.4],
            "num_tokens": 10,
            "memory": {"peak_bytes": 10 * 2**20, "nll_sum": 10.0, "num_tokens": 10},
        },
        "lm-eval": {"error": "no such | thing"},
        "gemm": {"seconds": [0.6, 1.4], "num_tokens": 10, "memory": {}},
    },
}


def test_aims_are_held_against_what_was_measured() -> None:
    found = {f.what: f for f in aims.findings({"demo-fp32-512": RECORD}, {})}
    assert found["perplexit × plain loop"].found == pytest.approx(1.2)
    assert found["perplexit × plain loop"].met
    assert found["share of the GEMM ceiling"].found == pytest.approx(0.65)
    assert not found["share of the GEMM ceiling"].met
    assert found["peak beyond the weights, against plain loop"].found == pytest.approx(0.1)
    assert "perplexit × lm-eval" not in found  # it failed, so nothing is claimed


def test_the_best_is_the_fastest_with_the_same_perplexity() -> None:
    def entry(seconds: float, nll: float) -> dict[str, Any]:
        memory = {"nll_sum": nll * 100, "num_tokens": 100}
        return {"seconds": [seconds], "num_tokens": 100, "memory": memory}

    record = {
        "contenders": {
            "lm-eval": entry(4.0, 3.0),
            "perplexit": entry(3.0, 3.0),
            "openvino bf16": entry(2.0, 3.0005),
            "openvino int8": entry(1.0, 3.01),
        }
    }
    assert aims.best_within(record, "lm-eval", 1e-3) == "openvino bf16"


def test_the_table_has_a_row_a_contender() -> None:
    rows = tables.big_table({"demo-fp32-512": RECORD})[2:]
    assert len(rows) == 4
    assert "1.20" in rows[0]
    assert "failed: no such / thing" in rows[2]
    assert {row.count(" |") for row in rows} == {10}


def test_the_report_says_where_it_was_measured() -> None:
    machine = dict.fromkeys(("processor", "cores", "memory_gib", "system", "python"), "P")
    machine |= {"instructions": ["avx2"], "versions": {"torch": "2", "openvino": None}}
    record = RECORD | {"machine": machine, "date": "2026-01-01"}
    record["conditions"] = {"threads": 2, "rounds": 5}
    lines = list(bench_run.report({"demo-fp32-512": record}, {}))
    assert lines[0].startswith("2026-01-01, P, P cores (avx2)")
    assert "torch 2" in lines[0]
    assert "openvino" not in lines[0]
    assert "2 threads, 5 rounds" in lines[0]
    assert any(line.startswith("| perplexit × plain loop |") for line in lines)
    assert list(bench_run.report({}, {})) == []


def test_the_page_keeps_its_prose(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = "<!-- measured: begin -->", "<!-- measured: end -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    pages.write_part(page, "measured", ["new", "lines"])
    assert page.read_text() == f"before\n{begin}\n\nnew\nlines\n\n{end}\nafter\n"
    with pytest.raises(ValueError, match="expected the lines <!-- growth"):
        pages.write_part(page, "growth", [])


@pytest.mark.parametrize("part", ["measured", "growth"])
def test_the_benchmark_page_has_the_marks(part: str, tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text("utf-8"), "utf-8")
    pages.write_part(page, part, ["found"])
    assert "\nfound\n" in page.read_text()


def test_growth_is_drawn_with_its_exponents(tmp_path: Path) -> None:
    sizes = (128, 256, 512)
    points = {
        "linear": [{"size": n, "seconds": n / 100, "peak_bytes": 2.0**20} for n in sizes],
        "square": [{"size": n, "seconds": n * n / 1e4, "peak_bytes": n * 1e4} for n in sizes],
    }
    found = growth.exponents(points)
    assert found["linear"]["seconds"] == pytest.approx(1)
    assert found["linear"]["peak_bytes"] == pytest.approx(0)
    assert found["square"]["seconds_at_the_end"] == pytest.approx(2)
    axis = {"label": "ids", "points": points, "exponents": found}
    names = ("window", "vocabulary", "batch", "documents")
    document = {"threads": 1, "axes": dict.fromkeys(names, axis)}
    pictures = growth_plot.draw_growth(document, tmp_path)
    assert [picture.name for picture in pictures] == ["scaling-time.png", "scaling-memory.png"]
    assert all(picture.stat().st_size > 10_000 for picture in pictures)
    assert growth_plot.growth_table(document)[3] == (
        "| window: 128 to 512 | square | 2.00 | 2.00 | 1.00 | 1.00 | 26.21 s, 5 MiB |"
    )


def test_a_worker_measures_a_turn(tiny_llama_dir: Path, ids_file: Path, tmp_path: Path) -> None:
    setting = Setting(str(tiny_llama_dir), "float32", 1, str(tmp_path))
    answering = worker.Answering("plain loop", setting)
    with pytest.raises(ValueError, match="a workload before a turn"):
        answering.answer({"do": "turn"})
    workload = Workload.of_windows(ids_file, NUM_WINDOWS, WINDOW).to_json()
    answering.answer({"do": "prepare", "workload": workload})
    timed, measured = (answering.answer({"do": what}) for what in ("turn", "memory"))
    assert timed["num_tokens"] == measured["num_tokens"] == NUM_WINDOWS * (WINDOW - 1)
    assert timed["nll_sum"] == pytest.approx(measured["nll_sum"])
    assert timed["seconds"] > 0
    assert measured["loaded_bytes"] > measured["peak_bytes"] >= 0
    with pytest.raises(ValueError, match="expected prepare, turn"):
        answering.answer({"do": "dance"})


def test_memory_is_the_turns_own_peak() -> None:
    """An earlier, larger peak of the process does not count."""

    def held(megabytes: int) -> int:
        worker.reset_high_water_mark()
        with HostMemory() as memory:
            mapped(megabytes * 2**20)
        return memory.peak_bytes - memory.start_bytes

    assert 190 * 2**20 < held(200) < 260 * 2**20
    assert 40 * 2**20 < held(50) < 110 * 2**20


@pytest.mark.slow
def test_one_section_from_end_to_end(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers in processes of their own; measured once, kept the second time."""
    command = [
        *(sys.executable, str(ROOT / "bench" / "run.py"), "--quick", "--threads", "1"),
        *("-o", str(tmp_path), "--model", f"tiny={tiny_llama_dir}", "--windows", "64"),
        *("--only", "fp32-64", "--contenders", "perplexit,plain loop,gemm", "--rounds", "2"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "tiny-fp32-64.json").read_text())
    assert list(record["contenders"]) == ["perplexit", "plain loop", "gemm"]
    for entry in record["contenders"].values():
        assert len(entry["seconds"]) == 2
    mine, plain = (record["contenders"][name] for name in ("perplexit", "plain loop"))
    assert mine["nll_sum"] == pytest.approx(plain["nll_sum"], rel=1e-5)
    assert mine["memory"]["peak_bytes"] >= 0
    assert record["flops"]["products"] > 0
    assert "| tiny-fp32-64 | perplexit |" in done.stdout

    capsys.readouterr()
    with patch.dict(os.environ):  # it sets threads for the processes that it starts
        assert bench_run.main(command[2:]) == 0
    assert "kept" in capsys.readouterr().err
    assert json.loads((tmp_path / "tiny-fp32-64.json").read_text()) == record
