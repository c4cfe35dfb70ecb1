"""The PyTorch session's own promises: head, padding, settings, memory. See also tests/contract."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from perplexit.errors import (
    EngineOutOfMemoryError,
    ModelError,
    QuantizationError,
    UsageError,
    VocabularyError,
)
from perplexit.sessions.pytorch import PytorchInferenceSession
from tests.oracles import MarkovModel, UniformModel, oracle_details, random_window, window_of
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE

KINDS = {
    "llama": "chunked (linear)",
    "gpt2": "chunked (linear)",
    "gemma2": "chunked (own forward)",
    "cohere": "chunked (own forward)",
    "granite": "chunked (own forward)",
}


@pytest.mark.trap(24)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_chunked_head_gives_what_model_forward_gives(name):
    """Trap 24: soft-cap, logit scale, logits scaling and final norm are in the chunked head."""
    model = TINY_MODELS[name]().eval()
    session = PytorchInferenceSession(model, max_logits_bytes=5 * 4 * VOCAB_SIZE)
    assert session.description.settings["head"] == KINDS[name]
    window = random_window(0, 100, VOCAB_SIZE)
    difference = session.token_nll([window])[0] - oracle_details(model, window).nll_N
    assert np.abs(difference).max() < 1e-5


@pytest.mark.trap(24)
def test_a_soft_cap_is_seen_where_the_untrained_logits_are_too_small_to_show_it():
    """Trap 24: near zero a cap at 30 changes nothing, but after training it would."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        final_logit_softcapping=30.0, initializer_range=1e-3,
    )  # fmt: skip
    session = PytorchInferenceSession(Gemma2ForCausalLM(config))
    assert session.description.settings["head"] == "chunked (own forward)"


def test_an_architecture_with_its_layers_one_level_down_is_split_there():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.2,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    session = PytorchInferenceSession(model)
    assert session.description.settings["head"].startswith("chunked")
    windows = [random_window(0, 50, VOCAB_SIZE), random_window(1, 20, VOCAB_SIZE)]
    for window, nll_N in zip(windows, session.token_nll(windows), strict=True):
        assert np.abs(nll_N - oracle_details(model, window).nll_N).max() < 1e-5


def test_a_head_that_cannot_be_split_runs_whole_and_says_so():
    class Reversed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = TINY_MODELS["llama"]()

        def forward(self, input_ids):
            return {"logits": self.inner(input_ids).logits.flip(-1)}

    model = Reversed()
    session = PytorchInferenceSession(model)
    assert session.description.settings["head"] == "whole forward"
    window = random_window(0, 20, VOCAB_SIZE)
    mirrored = window_of(window.ids_T)
    with torch.no_grad():
        logprobs = model(torch.tensor([window.ids_T.tolist()]))["logits"][0].double()
    logprobs = logprobs.log_softmax(-1)
    expected = [-float(logprobs[i - 1, window.ids_T[i]]) for i in range(1, 20)]
    assert session.token_nll([mirrored])[0] == pytest.approx(expected, abs=1e-5)


def test_a_uniform_model_has_perplexity_v():
    session = PytorchInferenceSession(UniformModel(1000))
    nll_N = session.token_nll([random_window(0, 50, 2)])[0]
    assert math.exp(nll_N.mean(dtype=np.float64)) == pytest.approx(1000, rel=1e-6)


def test_a_markov_chain_has_the_perplexity_of_its_entropy_rate():
    chain = MarkovModel(12)
    session = PytorchInferenceSession(chain)
    windows = [window_of(chain.sample(20_000))]
    details = session.token_details(windows)[0]
    assert math.exp(details.nll_N.mean(dtype=np.float64)) == pytest.approx(
        chain.perplexity, rel=0.03
    )
    assert math.exp(details.entropy_N.mean(dtype=np.float64)) == pytest.approx(
        chain.perplexity, rel=0.03
    )


@pytest.mark.trap(9)
def test_a_poisoned_padding_embedding_reaches_no_number():
    """Trap 9: rows are padded with an id of their own, so a NaN at id 0, 1 or V-1 stays unseen."""
    clean, poisoned = TINY_MODELS["llama"](), TINY_MODELS["llama"]()
    with torch.no_grad():
        poisoned.get_input_embeddings().weight[[0, 1, VOCAB_SIZE - 1]] = float("nan")
    rng = np.random.default_rng(0)
    windows = [window_of(rng.integers(2, VOCAB_SIZE - 1, n)) for n in (40, 7, 23, 2)]
    expected = PytorchInferenceSession(clean).token_nll(windows)
    got = PytorchInferenceSession(poisoned).token_nll(windows)
    for a, b in zip(expected, got, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.trap(25)
def test_dropout_is_off_and_the_training_flags_come_back():
    """Trap 25: a model handed in during training is scored in evaluation mode, then trains on."""
    model = TINY_MODELS["gpt2"]()
    model.train()
    model.transformer.h[0].attn.eval()  # a part that its owner froze
    flags = [module.training for module in model.modules()]
    session = PytorchInferenceSession(model)
    windows = [random_window(0, 30, VOCAB_SIZE)]
    first, second = (session.token_nll(windows)[0] for _ in range(2))
    assert np.array_equal(first, second)
    assert np.abs(first - oracle_details(model.eval(), windows[0]).nll_N).max() < 1e-5
    assert flags != [module.training for module in model.modules()]
    model.train()
    model.transformer.h[0].attn.eval()
    session.token_nll(windows)
    assert flags == [module.training for module in model.modules()]


def test_a_model_that_was_scored_can_still_be_trained_and_is_scored_anew():
    model = TINY_MODELS["llama"]()
    session = PytorchInferenceSession(model)
    window = random_window(0, 20, VOCAB_SIZE)
    before = session.token_nll([window])[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.tensor([window.ids_T.tolist()])
    model.train()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    after = session.token_nll([window])[0]
    assert after.mean() < before.mean()
    assert np.abs(after - oracle_details(model.eval(), window).nll_N).max() < 1e-5


@pytest.mark.trap(11)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_the_log_softmax_stays_in_float32(tiny_llama_dir, dtype):
    """Trap 11: given the model's own bfloat16 logits, the nll is float64's to 1e-5."""
    session = PytorchInferenceSession(tiny_llama_dir, dtype=dtype)
    assert session.description.dtype == dtype
    window = random_window(0, 60, VOCAB_SIZE)
    expected = oracle_details(session.module, window).nll_N
    # Trimming the last id may change which kernel makes the logits: all but a few are identical.
    difference = np.abs(session.token_nll([window])[0] - expected)
    assert np.median(difference) < 1e-5
    assert difference.max() < 0.1


def test_an_address_is_loaded_in_float32_whatever_the_checkpoint_says(tmp_path):
    TINY_MODELS["llama"]().to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    session = PytorchInferenceSession(tmp_path)
    assert session.description.dtype == "float32"
    assert {p.dtype for p in session.module.parameters()} == {torch.float32}
    assert PytorchInferenceSession(tmp_path, dtype="bf16").description.dtype == "bfloat16"


def test_a_loaded_model_keeps_its_dtype_and_refuses_another():
    model = TINY_MODELS["llama"]().to(torch.bfloat16)
    assert PytorchInferenceSession(model).description.dtype == "bfloat16"
    with pytest.raises(UsageError, match=r"model\.to\(torch\.float32\)"):
        PytorchInferenceSession(model, dtype="float32")


@pytest.mark.trap(18)
def test_ids_between_the_models_rows_and_the_tokenizers_size_are_refused(tiny_llama_dir):
    """Trap 18: the tokenizer knows an added token that the model has no row for."""
    session = PytorchInferenceSession(tiny_llama_dir)
    with pytest.raises(VocabularyError, match=f"0 to {VOCAB_SIZE - 1}.*window 0"):
        session.token_nll([window_of(np.array([1, 2, VOCAB_SIZE, 4]))])


@pytest.mark.trap(18)
def test_padded_vocabulary_rows_are_counted_as_rows(tmp_path):
    """Trap 18: rows without a token keep their share of the probability; the record says V."""
    model = TINY_MODELS["llama"]()
    model.resize_token_embeddings(VOCAB_SIZE + 64)
    session = PytorchInferenceSession(model)
    assert session.model.vocab_size == VOCAB_SIZE + 64
    window = random_window(0, 20, VOCAB_SIZE)
    difference = session.token_nll([window])[0] - oracle_details(model.eval(), window).nll_N
    assert np.abs(difference).max() < 1e-5


def test_a_window_longer_than_the_learned_positions_is_an_error_that_names_the_length(
    tiny_gpt2_dir,
):
    session = PytorchInferenceSession(tiny_gpt2_dir)
    assert len(session.token_nll([random_window(0, 257, VOCAB_SIZE)])[0]) == 256
    with pytest.raises(ModelError, match="--max-length 256"):
        session.token_nll([random_window(0, 258, VOCAB_SIZE)])


def test_a_model_that_sees_the_future_is_refused():
    config = BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.3,
    )  # fmt: skip
    with pytest.raises(ModelError, match="causal"):
        PytorchInferenceSession(BertLMHeadModel(config))


def test_running_out_of_memory_is_an_error_that_the_caller_can_halve_on(tiny_llama_dir):
    session = PytorchInferenceSession(tiny_llama_dir)

    def exhausted(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    forward = SimpleNamespace(rows=exhausted, head=None, takes_mask=True, alone=False)
    session._windows = replace(session._windows, forward=forward)
    with pytest.raises(EngineOutOfMemoryError, match="3 windows of up to 9 ids") as caught:
        session.token_nll([random_window(i, 9, VOCAB_SIZE) for i in range(3)])
    assert caught.value.__context__ is None  # the failed batch's tensors are free already


def test_other_runtime_errors_are_not_taken_for_a_lack_of_memory(tiny_llama_dir):
    session = PytorchInferenceSession(tiny_llama_dir)

    def broken(*args, **kwargs):
        raise RuntimeError("a real bug")

    forward = SimpleNamespace(rows=broken, head=None, takes_mask=True, alone=False)
    session._windows = replace(session._windows, forward=forward)
    with pytest.raises(RuntimeError, match="a real bug"):
        session.token_nll([random_window(0, 9, VOCAB_SIZE)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda:7"}, UsageError, "cpu"),
        ({"device": "abacus"}, UsageError, "abacus"),
        ({"dtype": "int3"}, UsageError, "int3"),
        ({"threads": 0}, UsageError, "from 1 to 1,024"),
        ({"quantization": "int7"}, QuantizationError, "nf4.*int8.*q4f16_0.*int7"),
    ],
)
def test_options_that_cannot_be_had_are_refused(tiny_llama_dir, options, error, message):
    with pytest.raises(error, match=message):
        PytorchInferenceSession(tiny_llama_dir, **options)


@pytest.mark.trap(33)
def test_threads_take_effect_and_are_recorded(tiny_llama_dir, monkeypatch):
    """Trap 33: an option that is given changes what happens."""
    seen = []
    session = PytorchInferenceSession(tiny_llama_dir, threads=2)
    rows = session._windows.forward.rows
    monkeypatch.setattr(
        session._windows.forward,
        "rows",
        lambda *a: seen.append(torch.get_num_threads()) or rows(*a),
    )
    try:
        session.token_nll([random_window(0, 5, VOCAB_SIZE)])
    finally:
        torch.set_num_threads(1)
    assert seen == [2]
    assert session.description.threads == 2


def test_lowered_matmul_precision_does_not_reach_a_float32_session(tiny_llama_dir, monkeypatch):
    session = PytorchInferenceSession(tiny_llama_dir)
    seen = []
    rows = session._windows.forward.rows
    monkeypatch.setattr(
        session._windows.forward,
        "rows",
        lambda *a: seen.append(torch.get_float32_matmul_precision()) or rows(*a),
    )
    torch.set_float32_matmul_precision("medium")
    try:
        session.token_nll([random_window(0, 5, VOCAB_SIZE)])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"]


def test_a_loaded_models_fingerprint_follows_its_weights():
    first, same, other = (TINY_MODELS["llama"]() for _ in range(3))
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    prints = [PytorchInferenceSession(m).model.weights_fingerprint for m in (first, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_a_closed_session_says_that_it_is_closed(tiny_llama_dir):
    session = PytorchInferenceSession(tiny_llama_dir)
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.token_nll([random_window(0, 5, VOCAB_SIZE)])


def test_batches_shrink_with_the_window_and_never_below_one(tiny_llama_dir):
    session = PytorchInferenceSession(tiny_llama_dir, device="cpu", threads=1)
    assert session.max_batch_size(1024) == 1
    assert session.max_batch_size(256) == 2
    assert session.max_batch_size(100_000) == 1


_PEAK_SCRIPT = """
import re
import numpy as np, psutil
from transformers import LlamaConfig, LlamaForCausalLM
from perplexit.inputs.windows import WindowIds
from perplexit.sessions.pytorch import PytorchInferenceSession

V, T = 256_000, 2048
config = LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
session = PytorchInferenceSession(LlamaForCausalLM(config), threads=1)
ids = np.random.default_rng(0).integers(0, V, T).astype(np.int32)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew at what is held now
before = psutil.Process().memory_info().rss
window = WindowIds(0, ids, np.arange(1, T))
details = session.token_details([window], top_k=5)[0]
assert len(details.nll_N) == T - 1 and np.isfinite(details.nll_N).all()
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print(session.description.settings["head"], peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_does_not_grow_with_vocabulary_times_window():
    """At 256k vocabulary and a 2048 window: at most a fifth of what float32 logits would take."""
    result = subprocess.run(
        [sys.executable, "-c", _PEAK_SCRIPT], capture_output=True, text=True, check=True
    )
    *kind, grown_bytes = result.stdout.split()
    assert " ".join(kind) == "chunked (linear)"
    # At least the one chunk of logits that is made: a figure below it would be no measurement.
    assert 2**25 < int(grown_bytes) <= 2048 * 256_000 * 4 / 5


@pytest.mark.real_model
def test_the_real_model_agrees_with_the_oracle(real_model_dir, real_text):
    from tokenizers import Tokenizer  # noqa: PLC0415

    ids = Tokenizer.from_file(str(real_model_dir / "tokenizer.json")).encode(real_text[:3000]).ids
    session = PytorchInferenceSession(real_model_dir)
    windows = [window_of(np.array(ids[:200])), window_of(np.array(ids[100:180]), range(40, 80))]
    for window, nll_N in zip(windows, session.token_nll(windows), strict=True):
        assert np.abs(nll_N - oracle_details(session.module, window).nll_N).max() < 1e-4
