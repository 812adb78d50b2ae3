"""Diagnosis of the machine: the recommended policy, backend settings, measured speed, and warnings."""

from tfmixed.doctor.diagnosis import Diagnosis, examine

__all__ = ["Diagnosis", "examine"]
