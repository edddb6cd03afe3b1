"""`python -m svp_bench`."""

from svp_bench.cli.main import entry_point

entry_point()
