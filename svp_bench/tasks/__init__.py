"""Task, suite and protocol cards."""
