"""Kernels and a memory layout for scoring on the CPU, instead of the plain ones of transformers."""
