"""Helpers without mixed-precision logic."""
