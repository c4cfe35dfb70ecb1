"""Models spread over devices by accelerate, split over processes, and with another attention."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import perplexit as px
from perplexit.errors import CapabilityError, MissingPackageError, ModelError, UsageError
from perplexit.sessions.prefill_decode import cached_session
from perplexit.sessions.pytorch import PytorchInferenceSession
from perplexit.sessions.pytorch import placement as pytorch_placement
from perplexit.sessions.pytorch.placement import check_attention, devices_of, head_device, places_of
from perplexit.sessions.pytorch.tensor_parallel import ProcessGroup, check_split
from tests.oracles import random_window
from tests.tiny_models import VOCAB_SIZE

WINDOWS = [
    random_window(n, length, VOCAB_SIZE, index=n) for n, length in enumerate((48, 48, 9, 30))
]
LLAMA_MAP: dict[str, str | int] = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
GPT2_MAP: dict[str, str | int] = {
    "transformer.wte": "cpu",
    "transformer.wpe": "cpu",
    "transformer.drop": "cpu",
    "transformer.h.0": "disk",
    "transformer.h.1": "cpu",
    "transformer.ln_f": "cpu",
    "lm_head": "cpu",
}


def largest_difference(left, right):
    assert [len(a) for a in left] == [len(b) for b in right]
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


@pytest.mark.trap(33)
@pytest.mark.parametrize(("model", "device_map"), [("llama", LLAMA_MAP), ("gpt2", GPT2_MAP)])
def test_layers_on_disk_give_the_same_losses_in_full_and_cached_mode(
    request, model: str, device_map: dict[str, str | int], tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"tiny_{model}_dir")
    map_file = tmp_path / "map.json"
    map_file.write_text(json.dumps(device_map))
    expected = PytorchInferenceSession(folder).token_nll(WINDOWS)
    session = PytorchInferenceSession(folder, device_map=map_file)
    assert largest_difference(session.token_nll(WINDOWS), expected) < 1e-5
    places = session.description.settings["modules_by_device"]
    assert places["disk"] == list(device_map.values()).count("disk")
    assert session.description.settings["head"].startswith("chunked"), "no whole logits"
    cached = cached_session(session, prompt_len=4, decode_chunk=5)
    assert largest_difference(cached.token_nll(WINDOWS), expected) < 1e-5
    assert any(parameter.device.type == "meta" for parameter in session.module.parameters())
    assert session.model.num_parameters == PytorchInferenceSession(folder).model.num_parameters


@pytest.mark.trap(33)
def test_the_device_auto_is_a_map_that_accelerate_makes(tiny_llama_dir) -> None:
    session = PytorchInferenceSession(tiny_llama_dir, device="auto")
    expected = PytorchInferenceSession(tiny_llama_dir).token_nll(WINDOWS)
    assert largest_difference(session.token_nll(WINDOWS), expected) < 1e-5
    assert sum(session.description.settings["modules_by_device"].values()) >= 1


def test_a_head_that_is_capped_after_its_layers_stays_so_when_spread(tiny_gemma2_dir) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    session = PytorchInferenceSession(tiny_gemma2_dir, device_map=device_map)
    expected = PytorchInferenceSession(tiny_gemma2_dir).token_nll(WINDOWS)
    assert largest_difference(session.token_nll(WINDOWS), expected) < 1e-5


def test_a_map_that_cannot_run_or_be_read_is_refused(tiny_gemma2_dir, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tied head"):
        PytorchInferenceSession(tiny_gemma2_dir, device_map={"model": "cpu", "lm_head": "disk"})
    with pytest.raises(UsageError, match=r"in JSON .* no such file"):
        PytorchInferenceSession(tiny_gemma2_dir, device_map=tmp_path / "none.json")
    with pytest.raises(UsageError, match="a device map such as"):
        PytorchInferenceSession(tiny_gemma2_dir, device_map={"model": 1.5})


def test_options_that_contradict_each_other_are_refused(tiny_llama_dir) -> None:
    with pytest.raises(UsageError, match="got both"):
        PytorchInferenceSession(tiny_llama_dir, device="cpu", device_map=LLAMA_MAP)
    with pytest.raises(UsageError, match="either tensor parallelism"):
        PytorchInferenceSession(tiny_llama_dir, device="auto", tensor_parallel=2)
    with pytest.raises(CapabilityError, match="on one device"):
        PytorchInferenceSession(tiny_llama_dir, device="auto", quantization="int8")
    with pytest.raises(CapabilityError, match="these are split"):
        PytorchInferenceSession(tiny_llama_dir, device="auto", compile_mode="default")
    loaded = PytorchInferenceSession(tiny_llama_dir).module
    for option in ({"attention": "eager"}, {"device_map": LLAMA_MAP}, {"tensor_parallel": 2}):
        with pytest.raises(UsageError, match="loaded model"):
            PytorchInferenceSession(loaded, **option)


def test_devices_of_a_map_with_accelerators_are_the_accelerators() -> None:
    """The map of a model over two GPUs and the disk, as accelerate writes it; no GPU is needed."""
    module = torch.nn.Linear(2, 2, device="meta")
    module.hf_device_map = {"a": 0, "b": 1, "c": "cpu", "d": "disk", "e": 1}
    assert places_of(module, torch.device("cpu")) == {"cuda:0": 1, "cuda:1": 2, "cpu": 1, "disk": 1}
    assert [str(x) for x in devices_of(module, torch.device("cpu"))] == ["cuda:0", "cuda:1"]


def test_the_session_computes_where_the_head_does() -> None:
    class Hook:
        execution_device = 1

    module = torch.nn.Linear(2, 2, device="meta")
    module._hf_hook = Hook()
    module.get_output_embeddings = lambda: module
    assert head_device(module) == torch.device("cuda:1")


@pytest.mark.trap(33)
def test_attention_is_chosen_recorded_and_costs_what_it_costs(tiny_llama_dir) -> None:
    sdpa = PytorchInferenceSession(tiny_llama_dir)
    eager = PytorchInferenceSession(tiny_llama_dir, attention="eager")
    assert sdpa.description.settings["attention"] == "sdpa"
    plain = PytorchInferenceSession(tiny_llama_dir, kernels="plain")
    assert plain.description.settings["attention"] == "sdpa"
    assert eager.description.settings["attention"] == "eager"
    assert largest_difference(eager.token_nll(WINDOWS), sdpa.token_nll(WINDOWS)) < 1e-5
    modules = {type(m).__name__: m for m in eager.module.modules()}
    assert modules["LlamaAttention"].config._attn_implementation == "eager"


def test_flash_attention_is_refused_where_it_cannot_run(tiny_llama_dir, monkeypatch) -> None:
    with pytest.raises(CapabilityError, match="CUDA alone"):
        PytorchInferenceSession(tiny_llama_dir, attention="flash_attention_2", device="cpu")
    with pytest.raises(UsageError, match="sdpa, eager, flash_attention_2"):
        PytorchInferenceSession(tiny_llama_dir, attention="fast")
    cuda = torch.device("cuda")
    monkeypatch.setattr(pytorch_placement, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install flash-attn"):
        check_attention("flash_attention_2", "bfloat16", cuda)
    monkeypatch.setattr(pytorch_placement, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match="got float32"):
        check_attention("flash_attention_2", "float32", cuda)
    check_attention("flash_attention_2", "bfloat16", cuda)


@pytest.fixture(scope="module")
def split(tiny_llama_dir):
    if torch.cuda.is_available():
        pytest.skip("transformers splits over the CUDA devices where there are some: tests/cuda")
    session = PytorchInferenceSession(tiny_llama_dir, tensor_parallel=2)
    yield session
    session.close()


@pytest.mark.slow
@pytest.mark.trap(33)
def test_two_processes_give_what_one_gives_and_one_writes_the_run(
    split, tiny_llama_dir, tmp_path: Path
) -> None:
    one = PytorchInferenceSession(tiny_llama_dir)
    assert largest_difference(split.token_nll(WINDOWS), one.token_nll(WINDOWS)) < 1e-5
    assert any(type(p).__name__ == "DTensor" for p in split.module.parameters())
    assert split.description.settings["tensor_parallel"] == 2
    assert split.model.num_parameters == one.model.num_parameters
    tokens = px.prepare(["A window is what one forward pass sees. " * 9], tokenizer=tiny_llama_dir)
    run = px.evaluate(split, tokens, run=tmp_path / "run", top_k=2)
    assert run.nll_sum == pytest.approx(px.evaluate(one, tokens).nll_sum, rel=1e-5)
    with pytest.raises(CapabilityError, match="several processes"):
        cached_session(split)
    with pytest.raises(UsageError, match="close the other session first"):
        PytorchInferenceSession(tiny_llama_dir, tensor_parallel=2)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_step_with_an_error_and_leaves_nothing_behind(
    split, tiny_llama_dir
) -> None:
    follower = split._opened.group._followers[0]
    follower.kill()
    follower.wait()
    began = time.monotonic()
    with pytest.raises(ModelError, match="tensor parallelism over 2 processes failed"):
        split.token_nll(WINDOWS)
    assert time.monotonic() - began < 60
    assert not torch.distributed.is_initialized()
    assert follower.poll() is not None
    split.close()


def test_heads_that_cannot_be_shared_out_are_refused(tiny_llama_dir) -> None:
    """Four heads, two of keys and values."""
    module = PytorchInferenceSession(tiny_llama_dir).module
    with pytest.raises(CapabilityError, match="num_attention_heads of 4, got 3"):
        check_split(module, 3)
    with pytest.raises(CapabilityError, match="num_key_value_heads of 2, got 4"):
        check_split(module, 4)
    with pytest.raises(CapabilityError, match="no plan for splitting LlamaForCausalLM"):
        check_split(module, 2)  # it was loaded whole


def test_a_group_that_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="2 processes or more"):
        ProcessGroup(1, None, 1)
    with pytest.raises(UsageError, match="leave --device out"):
        ProcessGroup(2, "cuda:1", 1)
    assert os.environ.get("RANK") is None
