"""Records of runs: schema, store, digests, selected configs. Imports no torch."""
