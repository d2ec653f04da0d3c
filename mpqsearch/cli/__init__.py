"""The command line: parse, call one stage, print. Results go to stdout, logs and progress to stderr. One file a
verb."""

from mpqsearch.cli import (
    allocate,
    card,
    distill,
    doctor,
    evaluate,
    export,
    import_,
    init,
    inspect,
    layers,
    profile,
    quantize,
    record,
    reference_data,
    report,
    run,
    search,
)
from mpqsearch.cli.app import app, main

VERBS = (
    init,
    layers,
    profile,
    allocate,
    search,
    evaluate,
    report,
    quantize,
    distill,
    export,
    card,
    import_,
    record,
    reference_data,
    run,
    inspect,
    doctor,
)
"""The modules that register the verbs."""

__all__ = ["VERBS", "app", "main"]
