"""bench/: its arithmetic, and that every contender scores the same tokens to the same losses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.resident import mapped

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
from sidebyside import command, contenders, growth, records, report, sections, workers  # noqa: E402 - scripts beside the package
from sidebyside.alternation import turns  # noqa: E402
from sidebyside.contenders import Score, Scored, Setting, Workload  # noqa: E402
from sidebyside.records import Spread, rate, share, speedup  # noqa: E402
from sidebyside.workloads import write_workload  # noqa: E402

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


def record_of(tokens: int = 1, **seconds: list[float]) -> dict[str, Any]:
    entries = {name: {"seconds": turns, "num_tokens": tokens} for name, turns in seconds.items()}
    return {"contenders": entries}


def test_ratios_are_taken_round_by_round() -> None:
    """The machine slows down by ten in the second round; the ratio stays 2."""
    record = record_of(base=[2.0, 20.0, 2.0], ours=[1.0, 10.0, 1.0])
    assert speedup(record, "ours", "base") == Spread(2.0, 2.0, 2.0)
    # three times the tokens in twice the time is 1.5 times the rate
    record = record_of(10, base=[1.0], ours=[2.0])
    record["contenders"]["ours"]["num_tokens"] = 30
    assert speedup(record, "ours", "base").median == pytest.approx(1.5)
    assert rate(record_of(100, ours=[1.0, 2.0, 4.0]), "ours").median == 50
    with pytest.raises(ValueError, match="zip"):
        speedup(record_of(base=[1.0], ours=[1.0, 2.0]), "ours", "base")


def test_flops() -> None:
    from sidebyside.gemm import attention_flops, product_flops  # noqa: PLC0415 - imports torch

    assert product_flops([2 * 3, 3 * 5], 7) == 2 * 7 * (6 + 15)
    # window of 3 ids: 1 + 2 + 3 pairs, two products of width multiply-adds each
    assert attention_flops([3], num_layers=2, width=8) == 2 * (1 + 2 + 3) * 2 * 8 * 2


def test_share_of_the_ceiling() -> None:
    record = record_of(gemm=[3.0, 3.0], ours=[4.0, 6.0])
    record["flops"] = {"products": 100.0, "attention": 20.0}
    assert share(record, "ours").high == pytest.approx(0.75)
    assert share(record, "ours", attention=True).high == pytest.approx(0.9)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_growth_exponent(exponent: float) -> None:
    sizes = [128, 256, 512, 1024]
    costs = [7 * size**exponent for size in sizes]
    assert growth.growth_exponent(sizes, costs) == pytest.approx(exponent)


# --- what is scored ----------------------------------------------------------------------------


IDS = np.random.default_rng(0).integers(2, 320, 400).astype(np.int32)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def workload(scratch: Path) -> Workload:
    return write_workload(scratch, IDS, NUM_WINDOWS, WINDOW)


def test_windows_share_one_id_and_score_each_id_once(workload: Workload) -> None:
    windows = workload.windows()
    assert [len(window.ids_T) for window in windows] == [WINDOW] * NUM_WINDOWS
    targets = np.concatenate([window.ids_T[window.targets_N] for window in windows])
    assert targets.tolist() == IDS[1 : NUM_WINDOWS * (WINDOW - 1) + 1].tolist()
    assert [window.ids_T[0] for window in windows[1:]] == [w.ids_T[-1] for w in windows[:-1]]
    assert workload.tokens.num_targets == NUM_WINDOWS * (WINDOW - 1)


def test_strided_windows_are_those_of_the_protocol(scratch: Path) -> None:
    workload = write_workload(scratch, IDS, NUM_WINDOWS, WINDOW, strided=True)
    assert [(w.start, w.stop) for w in workload.tokens.windows] == [
        (start, start + WINDOW)
        for start in range(0, NUM_WINDOWS * WINDOW - WINDOW // 2, WINDOW // 2)
    ]
    scored = [len(window.targets_N) for window in workload.windows()]
    assert scored == [WINDOW - 1, *[WINDOW // 2] * 4]
    assert sum(scored) == workload.tokens.num_targets == NUM_WINDOWS * WINDOW - 1


def test_a_workload_needs_its_ids(scratch: Path) -> None:
    with pytest.raises(ValueError, match="expected 401 ids, got 400"):
        write_workload(scratch, IDS, 8, 51)


# --- every contender on one tiny model ---------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tiny_llama_dir: Path, scratch: Path) -> Callable[[str], Score]:
    def of(name: str) -> Score:
        program = None
        if name == "llama.cpp":
            pytest.importorskip("llama_cpp")
            from sidebyside.perplexit_contenders import compiled  # noqa: PLC0415 - imports torch

            program = contenders.CONTENDERS[name].program
            program = compiled(tiny_llama_dir, str(scratch / "gguf"), program)
        setting = Setting(str(tiny_llama_dir), "float32", 1, program)
        opened = workers.OpenContender(name, setting)

        def score(workload: Workload) -> Scored:
            opened.prepare(workload)
            return opened.score(workload)

        return score

    return of


@pytest.fixture(scope="module")
def ours(opened: Callable[[str], Score], workload: Workload) -> Scored:
    return opened("perplexit")(workload)


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
        "lm-eval's algorithm",
        "perplexit, compiled head",
        "llama.cpp",
        "one token a call",
    ],
)
def test_contenders_score_the_same(
    name: str, opened: Callable[[str], Score], workload: Workload, ours: Scored
) -> None:
    found = opened(name)(workload)
    assert found.num_tokens == ours.num_tokens == workload.tokens.num_targets
    assert found.nll_sum == pytest.approx(ours.nll_sum, rel=1e-5)
    if found.nll is not None and ours.nll is not None:
        assert found.nll == pytest.approx(ours.nll, abs=1e-4)


def test_the_guides_loop_gives_the_guides_number(
    opened: Callable[[str], Score], scratch: Path
) -> None:
    workload = write_workload(scratch, IDS, NUM_WINDOWS, WINDOW, strided=True)
    theirs, mine = (opened(name)(workload) for name in ("hf guide", "perplexit"))
    assert theirs.nll_sum == pytest.approx(mine.nll_sum, rel=1e-5)
    assert theirs.own_perplexity == pytest.approx(mine.own_perplexity, rel=1e-5)
    assert theirs.own_perplexity != pytest.approx(
        np.exp(theirs.nll_sum / theirs.num_tokens), rel=1e-6
    )


def test_long_windows_are_decoded_at_sampled_positions(
    opened: Callable[[str], Score], scratch: Path
) -> None:
    workload = write_workload(scratch, IDS, 1, 257)
    loop = opened("one token a call")(workload)
    together = opened("perplexit cached, 64 windows")(workload)
    assert together.num_tokens == 64 * loop.num_tokens
    assert (loop.seconds or 0) > 0
    assert (together.seconds or 0) > 0


@pytest.mark.parametrize("family", ["tiny_llama_dir", "tiny_gpt2_dir"])
def test_the_ceiling_is_all_the_models_products(
    family: str, scratch: Path, request: pytest.FixtureRequest
) -> None:
    """Two operations a weight and row, counted from the checkpoint without embeddings."""
    from sidebyside.gemm import GemmCeiling  # noqa: PLC0415 - imports torch

    folder = request.getfixturevalue(family)
    ceiling = GemmCeiling(Setting(str(folder), "float32", 1))
    matrices = {
        name: parameter.numel()
        for name, parameter in ceiling.model.named_parameters()
        if parameter.dim() == 2 and not any(part in name for part in ("wte", "wpe", "embed"))
    }
    head = 320 * 32
    body = sum(matrices.values()) - matrices.get("lm_head.weight", 0)
    rows = 2 * (WINDOW - 1)
    workload = write_workload(scratch, IDS, 2, WINDOW)
    ceiling.prepare(workload)
    scored = ceiling(workload)
    assert scored.flops is not None
    assert scored.flops["products"] == 2 * rows * (body + head)
    assert scored.nll_sum is None
    assert (scored.seconds or 0) > 0


# --- sections, tables, the command -------------------------------------------------------------


def test_sections_have_known_contenders_and_their_base() -> None:
    found = list(sections.alternations(("demo", "gpt2"), (512, 1024, 2048)))
    names = [section.name for section in found]
    assert len(set(names)) == len(names)
    assert "gpt2-fp32-2048" not in names  # it has 1024 positions
    for section in found:
        assert section.windows >= 2  # one a thread
        assert set(section.contenders) <= contenders.CONTENDERS.keys()
        assert section.base in section.contenders
    order = {section.name: sections.section_order(section.kind, section.name) for section in found}
    ordered = sorted(names, key=lambda name: order[name])
    assert ordered[:3] == ["demo-fp32-512", "demo-fp32-1024", "demo-fp32-2048"]
    assert ordered[3:5] == ["gpt2-fp32-1024", "demo-bf16-512"]


@pytest.mark.parametrize(
    ("only", "count"),
    [("fp32-1024", 2), ("openvino", 1), ("igf", 1), ("growth", 21), ("against-", 4), ("1gb", 1)],
)
def test_sections_are_chosen_by_name(
    only: str, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = list(command._plan(command._options(["--only", only], None)))
    assert len(plan) == count
    assert all(only in section.name for section in plan)


def test_every_aim_is_about_contenders_of_its_section() -> None:
    for kind in (kind for kind in sections.KINDS.values() if kind.contenders):
        for measure, name, base, _ in kind.aims:
            assert measure in records.MEASURES
            assert {name, base} <= {*kind.contenders, "", records.BEST}


def test_growth_is_a_section_for_each_point() -> None:
    names = [section.name for section in growth.growth_sections()]
    assert names[0] == "growth-window-256"
    assert names[-1] == "growth-documents-64000"
    assert len(set(names)) == len(names) == 21


RECORD: dict[str, Any] = {
    "kind": "fp32",
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
    aims = sections.KINDS["fp32"].aims
    found = {f.what: f for f in records.findings("demo-fp32-512", RECORD, aims)}
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
    assert records.best_within(record, "lm-eval", 1e-3) == "openvino bf16"


def test_the_table_has_a_row_a_contender() -> None:
    cells = list(report.contender_rows("demo-fp32-512", RECORD))
    rows = report.table(report.CONTENDERS_HEADER, cells)[2:]
    assert len(rows) == 4
    assert "1.20" in rows[0]
    assert "failed: no such / thing" in rows[2]
    assert {row.count(" |") for row in rows} == {12}


def test_the_report_says_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(report.platform, "python_version", lambda: "9.9")
    record = RECORD | {"machine": report.machine(), "date": "2026-01-01", "took_seconds": 90.0}
    record["conditions"] = {"threads": 2, "rounds": 5, "quick": False}
    lines = list(report.report({"demo-fp32-512": record}))
    assert lines[0].startswith("2026-01-01, ")
    assert " cores (" in lines[0]
    assert "Python 9.9; torch 2" in lines[0]
    assert "no-such-package" not in lines[0]
    text = "\n".join(lines)
    assert "`python bench/run.py --only fp32`" in text
    assert "2 threads, 5 rounds, 1.5 minutes" in text
    assert "| perplexit × plain loop |" in text
    assert "| perplexit |" in text
    assert "tensors (MiB)" not in text  # nothing was measured for that column
    assert list(report.report({})) == []


def test_rows_of_a_function_are_a_table() -> None:
    record = {
        "kind": "prepare",
        "rows": [{"MB": 1.5, "times `encode_batch`": [1.0, 1.1, 1.3], "same": True, "p": None}],
        "machine": "M",
        "date": "2026-01-01",
        "took_seconds": 1.0,
        "conditions": {"threads": 2, "rounds": 3, "quick": False},
    }
    text = "\n".join(report.report({"prepare": record}))
    assert "| 1.5 | 1.1 (1–1.3) | True |  |" in text
    assert "| times `encode_batch` | prepare | ≤ 1.2 | 1.1 | yes |" in text


def test_the_page_keeps_its_prose(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    begin, end = "<!-- measured: begin -->", "<!-- measured: end -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    report.write_part(page, "measured", ["new", "lines"])
    assert page.read_text() == f"before\n{begin}\n\nnew\nlines\n\n{end}\nafter\n"
    with pytest.raises(ValueError, match="expected the lines <!-- growth"):
        report.write_part(page, "growth", [])


@pytest.mark.parametrize("part", ["measured", "growth"])
def test_the_benchmark_page_has_the_marks(part: str, tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text("utf-8"), "utf-8")
    report.write_part(page, part, ["found"])
    assert "\nfound\n" in page.read_text()


def test_growth_is_drawn_and_its_exponents_are_in_a_table(tmp_path: Path) -> None:
    sizes = (128, 256, 512)
    points = {
        "linear": [{"size": n, "seconds": n / 100, "peak_bytes": 2.0**20} for n in sizes],
        "square": [{"size": n, "seconds": n * n / 1e4, "peak_bytes": n * 1e4} for n in sizes],
    }
    axis = {"label": "ids", "points": points}
    names = ("window", "vocabulary", "batch", "documents")
    axes = dict.fromkeys(names, axis)
    pictures = growth.draw_growth(axes, tmp_path)
    assert [picture.name for picture in pictures] == ["scaling-time.png", "scaling-memory.png"]
    assert all(picture.stat().st_size > 10_000 for picture in pictures)
    assert growth.growth_table(axes)[2:4] == [
        "| window: 128 to 512 | linear | 1.00 | 1.00 | 0.00 | 0.00 | 5.12 s, 1 MiB |",
        "| window: 128 to 512 | square | 2.00 | 2.00 | 1.00 | 1.00 | 26.21 s, 5 MiB |",
    ]


def test_growth_is_read_from_the_records_of_all_points() -> None:
    entry = {"cpu_seconds": [3.0, 1.0, 2.0], "memory": {"peak_bytes": 7}}
    found = {
        section.name: {"contenders": dict.fromkeys(section.contenders, entry)}
        for section in growth.growth_sections()
    }
    assert growth.growth_axes({name: found[name] for name in list(found)[1:]}) is None
    axes = growth.growth_axes(found)
    assert axes is not None
    assert list(axes) == ["window", "vocabulary", "batch", "documents"]
    first = axes["window"]["points"]["plain loop"][0]
    assert first == {"size": 256, "seconds": 1.0, "peak_bytes": 7}
    assert (
        growth.growth_axes(found | {"growth-batch-1": {"contenders": {"": {"error": ""}}}}) is None
    )


def test_a_worker_measures_a_turn(tiny_llama_dir: Path, workload: Workload) -> None:
    setting = Setting(str(tiny_llama_dir), "float32", 1)
    opened = workers.OpenContender("plain loop", setting)
    opened.prepare(workload)
    timed, measured = opened.turn(workload), opened.memory(workload)
    assert timed["num_tokens"] == measured["num_tokens"] == NUM_WINDOWS * (WINDOW - 1)
    assert timed["nll_sum"] == pytest.approx(measured["nll_sum"])
    assert timed["seconds"] > 0
    assert measured["loaded_bytes"] > measured["peak_bytes"] >= 0
    assert measured["process_bytes"] >= measured["loaded_bytes"]


def test_a_process_says_what_went_wrong(tmp_path: Path) -> None:
    process = workers.OwnProcess(1, log=tmp_path / "log")
    with pytest.raises(workers.WorkerError, match="ValueError: invalid literal"):
        process.start(int, "x")()
    with pytest.raises(workers.WorkerError, match=r"ended early; see .*log"):
        process.start(os._exit, 3)()
    process.close()
    assert "invalid literal" in (tmp_path / "log").read_text()


def test_memory_is_the_turns_own_peak() -> None:
    """An earlier, larger peak of the process does not count."""

    def held(megabytes: int) -> int:
        with workers.PeakMemory() as memory:
            mapped(megabytes * 2**20)
        return memory.host_rss_peak_bytes

    assert 190 * 2**20 < held(200) < 260 * 2**20
    assert 40 * 2**20 < held(50) < 110 * 2**20


@pytest.mark.slow
def test_one_section_from_end_to_end(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers in processes of their own; measured once, kept the second time."""
    arguments = [
        *(sys.executable, str(ROOT / "bench" / "run.py"), "--quick", "--threads", "1"),
        *("-o", str(tmp_path), "--model", f"tiny={tiny_llama_dir}", "--windows", "64"),
        *("--only", "fp32-64", "--contenders", "perplexit", "plain loop", "gemm", "--rounds", "2"),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
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
    assert command.main(arguments[2:]) == 0
    assert "kept" in capsys.readouterr().err
    assert json.loads((tmp_path / "tiny-fp32-64.json").read_text()) == record
