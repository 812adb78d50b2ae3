"""Diagnosis of this machine: which policy fits it, how fast it is, and what makes mixed precision useless on it."""

from tfmixed.doctor.diagnosis import Diagnosis, examine

__all__ = ["Diagnosis", "examine"]
