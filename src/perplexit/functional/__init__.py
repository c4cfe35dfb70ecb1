"""Tensors in, per-token tensors out (torch; no state)."""
