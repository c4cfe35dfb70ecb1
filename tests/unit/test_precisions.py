"""Precision names and who makes each."""

import pytest

from perplexit.errors import QuantizationError, UsageError
from perplexit.quantization.precisions import (
    canonical_dtype,
    canonical_precision,
    known_precisions,
    recipe_for,
)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("fp32", "float32"),
        ("float32", "float32"),
        ("f32", "float32"),
        ("torch.float32", "float32"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("bf16", "bfloat16"),
        (" BFloat16 ", "bfloat16"),
    ],
)
def test_dtype_synonyms(spelling, name):
    assert canonical_dtype(spelling) == name


def test_an_unknown_dtype_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match=r"bfloat16.*got 'int7'"):
        canonical_dtype("int7")


@pytest.mark.parametrize(
    ("spelling", "name"), [("8bit", "int8"), ("4-bit", "int4"), ("INT4", "int4")]
)
def test_precision_synonyms(spelling, name):
    assert canonical_precision(spelling) == name
    assert recipe_for(spelling, engine="onnx").precision == name


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
def test_onnx_recipes_are_blocks_of_32(precision, bits):
    recipe = recipe_for(precision, engine="onnx")
    assert (recipe.weights.bits, recipe.weights.block_size) == (bits, 32)
    assert "MatMulNBits" in recipe.library


def test_a_precision_that_the_engine_cannot_make_is_refused_with_those_it_can():
    with pytest.raises(QuantizationError, match=r"int8, int4; got 'nf3'"):
        recipe_for("nf3", engine="onnx")


def test_the_refusal_names_the_engine_that_can():
    with pytest.raises(QuantizationError, match=r"none in this version.*which onnx.* can make"):
        recipe_for("int4", engine="abacus")
    assert known_precisions("abacus") == ()
