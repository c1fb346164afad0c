"""Admission: which deltas are served, at which fidelity, and a log of why."""

from deltakeeper.service.admission.deciding import PolicyAdmission
from deltakeeper.service.admission.decisions import DecisionLog
from deltakeeper.service.admission.policy import Policy, read_policy

__all__ = ["DecisionLog", "Policy", "PolicyAdmission", "read_policy"]
