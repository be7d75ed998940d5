"""`python -m mor` is the `mor` command."""

from mor.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
