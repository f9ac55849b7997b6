"""Models, losses, metrics, checkpoints in plain torch; the LightningModules; the command line."""
