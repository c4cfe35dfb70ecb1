"""Why two runs differ: every difference by name, and what each contributes."""

from perplexit.diagnosis.differences import Difference
from perplexit.diagnosis.explanation import Explanation, explain
from perplexit.diagnosis.steps import Step

__all__ = ["Difference", "Explanation", "Step", "explain"]
