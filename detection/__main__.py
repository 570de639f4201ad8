"""`python -m detection` is `hoyer-det`."""

from detection.cli import main

if __name__ == "__main__":
    main()
