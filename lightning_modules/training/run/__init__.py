"""The life of a run: checkpoints, signals, agreement of ranks, strategies, resume."""
