"""One file per pruning strategy."""
