"""Helpers below all other folders."""
