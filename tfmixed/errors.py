"""The exceptions that tfmixed raises beyond Python's own."""


class ConfigError(ValueError):
    """A configuration file cannot be used; the message names file, key and remedy."""
