"""`python -m svp_bench`."""

from svp_bench.cli import entry_point

entry_point()
