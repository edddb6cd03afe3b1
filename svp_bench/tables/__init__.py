"""Comparison tables from records: rows, statistics, renderers. Imports no torch."""
