"""Quantized weights on the real model: each precision stays in its band of losses."""

import numpy as np
import pytest

import perplexit as px

pytestmark = [pytest.mark.real_model, pytest.mark.slow]


@pytest.fixture(scope="module")
def tokens(real_model_dir, real_text, tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "in.safetensors"
    return px.prepare(
        [real_text[:700]], tokenizer=str(real_model_dir), protocol="disjoint", max_length=128,
        output=path,
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(real_model_dir, tokens):
    return px.evaluate(f"hf:{real_model_dir}", tokens)


@pytest.mark.parametrize(
    ("precision", "package", "most_mean", "bits"),
    [
        ("int8", "torchao", 5e-2, (13.0, 13.2)),
        ("mxint8", "torch", 5e-2, (13.2, 13.3)),
        ("nf4", "bitsandbytes", 1.0, (10.2, 10.4)),
        ("q4f16_0", "torch", 1.0, (4.5, 4.6)),
    ],
)
def test_bands(precision, package, most_mean, bits, real_model_dir, tokens, reference):
    """8 bits move the mean by at most 5e-2 nats; 4 bits by at least 1e-3 a token, and below 1."""
    pytest.importorskip(package)
    run = px.evaluate(f"hf:{real_model_dir}", tokens, quantization=precision)
    difference = run.tokens.nll - reference.tokens.nll
    assert abs(difference.mean()) < most_mean
    assert np.abs(difference).mean() > 1e-3
    quantization = run.to_json()["session"]["quantization"]
    assert quantization["num_modules"] == (212 if precision == "q4f16_0" else 210)
    assert bits[0] < quantization["effective_bits"] < bits[1]
