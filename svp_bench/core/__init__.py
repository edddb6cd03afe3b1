"""Errors, registry, resources, atomic files, signals, YAML with positions. Imports nothing else of the package."""
