"""Where what must outlive the process is kept. Empty so far: budgets and jobs will fill it."""
