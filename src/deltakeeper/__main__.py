"""The command line as `python -m deltakeeper`, for environments whose scripts are not on the path."""

from deltakeeper.cli import main

if __name__ == "__main__":
    main()
