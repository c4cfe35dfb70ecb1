"""Precisions: their names, and what a quantization did to a model's weights."""

import perplexit.checkpoints  # noqa: F401 - keeps torchao and bitsandbytes quiet while they are imported
