"""Adapters: one file a kind, all with the verbs of `base.Backend`, all under one contract suite."""
