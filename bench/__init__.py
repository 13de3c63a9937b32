"""Benchmarks: FLOPs, latency and memory, against what a user would run instead.

`python -m bench --help`; the row format and what each column means are in bench/README.md.
"""

import os

# read when torch is imported: its profiler would write two lines to stderr for each call
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
