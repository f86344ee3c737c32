"""Pure policies and formats: plain functions and values, no I/O, clock, randomness or logging."""
