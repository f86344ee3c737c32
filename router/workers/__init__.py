"""Several processes that serve as one: the parent, its workers, and what goes between them."""
