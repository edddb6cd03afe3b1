"""Check records for what they claim: schema, splits, budget, search, seeds, code."""
