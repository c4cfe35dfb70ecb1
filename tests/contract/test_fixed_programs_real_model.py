"""Programs of fixed sizes (TVM, AOTInductor): PyTorch's losses on real text."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from perplexit.compilation.targets import compile
from perplexit.sessions.registry import load_session
from tests.oracles import oracle_details, window_of

pytestmark = [pytest.mark.slow]
LENGTH = 32


@pytest.mark.real_model
@pytest.mark.parametrize(("engine", "package"), [("tvm", "tvm"), ("pt2", "torch")])
def test_a_float32_program_gives_pytorchs_losses(
    engine, package, real_model_dir, real_text, tmp_path
):
    pytest.importorskip(package)
    encoded = Tokenizer.from_file(str(real_model_dir / "tokenizer.json")).encode(real_text)
    windows = [window_of(np.array(encoded.ids[a:b])) for a, b in ((0, 32), (32, 52))]
    program = compile(real_model_dir, to=engine, output=tmp_path / "p", max_length=LENGTH)
    session = load_session(program.folder, threads=1)
    nll = np.concatenate(session.token_nll(windows)).astype(np.float64)
    session.close()
    model = AutoModelForCausalLM.from_pretrained(real_model_dir, dtype=torch.float32).eval()
    reference = np.concatenate([oracle_details(model, window).nll_N for window in windows])
    difference, mean = np.abs(nll - reference).max(), nll.mean() - reference.mean()
    print(f"{engine}: {len(nll)} tokens, largest {difference:.1e}, mean {mean:.1e} nats")
    assert difference < 2e-3
    assert abs(mean) < 1e-4
