"""Helpers that know nothing of mixed precision."""
