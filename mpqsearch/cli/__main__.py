"""``python -m mpqsearch.cli``."""

from mpqsearch.cli import main

if __name__ == "__main__":
    main()
