"""Checkpoints: what their identity is, and how they become a PyTorch model."""
