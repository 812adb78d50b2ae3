"""`python -m tfmixed` is the command `tfmixed`."""

from tfmixed.cli import main

if __name__ == "__main__":
    main()
