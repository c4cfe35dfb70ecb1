"""TVM's kernels under our loops: still the products that they were, on every processor level."""

import json

import numpy as np
import pytest

from perplexit.compilation.targets import compile
from perplexit.errors import CapabilityError
from perplexit.sessions.registry import load_session

tvm = pytest.importorskip("tvm")
from tvm import te  # noqa: E402

from perplexit.compilation.tvm_build import cpu_target, scheduled  # noqa: E402
from perplexit.quantization import tvm_engine  # noqa: E402


def product(batch, rows, columns, summed, *, transposed):
    """X · W or X · Wᵀ as TVM's own legalization writes them."""
    shape_w = (columns, summed) if transposed else (summed, columns)
    lead = (batch,) if batch else ()
    x = te.placeholder((*lead, rows, summed), "float32", name="x")
    w = te.placeholder(shape_w, "float32", name="w")
    k = te.reduce_axis((0, summed), "k")

    def value(*at):
        *_, _, j = at
        return te.sum(x(*at[:-1], k) * (w[j, k] if transposed else w[k, j]), axis=k)

    name = "NT_matmul" if transposed else "matmul"
    result = te.compute((*lead, rows, columns), value, name=name)
    return te.create_prim_func([x, w, result])


@pytest.mark.parametrize("processor", tvm_engine.PROCESSORS, ids=lambda each: each.level or "any")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [(0, 64, 96, 64), (0, 51, 101, 37), (3, 17, 65, 64)], ids=str)
def test_a_tiled_product_is_the_product(processor, transposed, sizes):
    if not tvm_engine.runs_level(processor.level):
        pytest.skip(f"this processor is not of level {processor.level}")
    module = tvm.IRModule({"main": product(*sizes, transposed=transposed)})
    tiled = scheduled(processor)(module)
    assert "local" in tiled.script(), "the product was left as it was"
    run = tvm.compile(tiled, target=cpu_target(processor))["main"]
    batch, rows, columns, summed = sizes
    rng = np.random.default_rng(0)
    x = rng.standard_normal((*([batch] if batch else []), rows, summed), dtype=np.float32)
    w = rng.standard_normal((columns, summed) if transposed else (summed, columns), dtype="f")
    expected = x.astype(float) @ (w.T if transposed else w).astype(float)
    given = [tvm.runtime.tensor(each) for each in (x, w, np.full(expected.shape, np.nan, "f"))]
    run(*given)
    assert np.abs(given[2].numpy() - expected).max() < 1e-4


def test_a_program_for_a_better_processor_is_refused(tiny_llama_dir, tmp_path, monkeypatch):
    program = compile(tiny_llama_dir, to="tvm", output=tmp_path / "p", max_length=16)
    record = json.loads(next(program.folder.glob("*.json")).read_text())
    assert record["made_by"]["processor_level"] == tvm_engine.this_processor().level
    monkeypatch.setattr(tvm_engine, "runs_level", lambda level: False)
    with pytest.raises(CapabilityError, match="Compile the program on this machine"):
        load_session(program.folder)
