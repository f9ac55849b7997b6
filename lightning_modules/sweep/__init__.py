"""Many checkpoints on many benchmarks: planned, run on a cluster or here, and tabulated."""
