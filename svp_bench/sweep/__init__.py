"""Sweeps: many runs as one command that may be cut off anywhere and goes on: plan, search, engines, live view."""
