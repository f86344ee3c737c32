"""The path of a call, and what watches it: async and thin, the decisions are `core`'s."""
