"""Compose layers of YAML into one resolved config."""
