"""`python -m tfmixed` is the command `tfmixed`."""

from tfmixed._cli.main import main

if __name__ == "__main__":
    main()
