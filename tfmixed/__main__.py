"""`python -m tfmixed` is the command `tfmixed`."""

from tfmixed.cli import main

main()
