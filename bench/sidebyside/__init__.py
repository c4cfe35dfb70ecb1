"""Perplexit and its peers side by side: workers that take turns, and the table's arithmetic."""

import perplexit.checkpoints  # noqa: F401 - keeps torchao and bitsandbytes quiet in every process
