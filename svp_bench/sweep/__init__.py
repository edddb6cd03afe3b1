"""Sweeps: many runs as one command that can be interrupted and continued: plan, search, engines, live view."""
