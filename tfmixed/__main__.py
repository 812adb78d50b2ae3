"""Entry point of `python -m tfmixed`."""

from tfmixed._cli.main import main

if __name__ == "__main__":
    main()
