"""ONNX Runtime: programs that `perplexit compile` made, and those of other exporters."""

from perplexit.sessions.onnx.session import OnnxInferenceSession

__all__ = ["OnnxInferenceSession"]
