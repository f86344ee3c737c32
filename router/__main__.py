"""`python -m router` is the command `rungway`."""

from router.cli.main import main

if __name__ == "__main__":
    main()
