"""Commands of the `tfmixed` command line."""
