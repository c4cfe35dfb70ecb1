"""Why two runs differ (`explain`), and whether a model's figures can be trusted (`doctor`)."""

from perplexit.diagnosis.doctor_checks import doctor
from perplexit.diagnosis.doctor_findings import Diagnosis, Finding
from perplexit.diagnosis.explain_runs import Explanation, explain
from perplexit.diagnosis.run_differences import Difference
from perplexit.diagnosis.step_contributions import Step

__all__ = ["Diagnosis", "Difference", "Explanation", "Finding", "Step", "doctor", "explain"]
