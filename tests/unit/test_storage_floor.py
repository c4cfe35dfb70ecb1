"""Trap 16 in a comparison: a KL that is not above its reference's storage is flagged."""

from pathlib import Path

import pytest

import perplexit as px
from tests.unseen_text import DOCUMENTS


@pytest.mark.trap(16)
def test_trap_16_a_kl_below_the_floor_of_float16_states_is_flagged(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    tokens = px.prepare(
        DOCUMENTS[:3], tokenizer=tiny_llama_dir, max_length=32, output=tmp_path / "in.safetensors"
    )
    half = tmp_path / "half"
    px.evaluate(tiny_llama_dir, tokens, save_reference=True, reference_dtype="float16", run=half)
    px.evaluate(tiny_llama_dir, tokens, reference=half, run=tmp_path / "same")
    found = px.compare(half, tmp_path / "same")
    mean, largest = found.divergences.floor
    assert 0 < mean < largest
    assert found.divergences.num_below_floor > found.num_tokens / 2
    value = found.figures()["mean_kl"].value
    assert value == pytest.approx(mean, rel=0.5)
    assert any("says nothing" in text for text in found.warnings) == (value <= mean)
