"""Why two runs differ (`explain`), and whether a model's figures can be trusted (`doctor`)."""

from perplexit.diagnosis.differences import Difference
from perplexit.diagnosis.examination import doctor
from perplexit.diagnosis.explanation import Explanation, explain
from perplexit.diagnosis.findings import Diagnosis, Finding
from perplexit.diagnosis.steps import Step

__all__ = ["Diagnosis", "Difference", "Explanation", "Finding", "Step", "doctor", "explain"]
