"""``python -m mpqsearch``: the command line, where the script ``mpqsearch`` is not on the path."""

from mpqsearch.cli import main

if __name__ == "__main__":
    main()
