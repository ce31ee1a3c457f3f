"""`python -m edgetune` is the command line."""

from edgetune.cli import main

if __name__ == "__main__":
    main()
