"""What a long run needs around a LightningModule: optimisers, checkpoints, signals and health."""
