"""Whether this run takes everything (``make test-all``), or of long lists a sample."""

import os

ALL = os.environ.get("MPQSEARCH_TEST_ALL", "") not in ("", "0")
