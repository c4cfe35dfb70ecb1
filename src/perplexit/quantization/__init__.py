"""Precisions: their names, and what a quantization did to a model's weights."""
