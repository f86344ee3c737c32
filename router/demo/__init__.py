"""`rungway serve --demo`: a small real model on this machine, for a first call without set-up."""
