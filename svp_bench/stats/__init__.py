"""Intervals, tests and power: pure functions of arrays, no I/O."""
