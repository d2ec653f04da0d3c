"""The command line: parse, call one stage, print. Results go to stdout, logs and progress to stderr. One file a
verb."""

from importlib import import_module

from mpqsearch.cli.app import app, main

VERBS = (
    *("init", "layers", "profile", "allocate", "search", "evaluate", "report", "quantize", "distill", "export", "card"),
    *("import_", "record", "reference_data", "run", "inspect", "doctor"),
)
"""The modules that register the verbs, in the order in which help lists them."""

for _verb in VERBS:
    import_module(f"mpqsearch.cli.{_verb}")

__all__ = ["VERBS", "app", "main"]
