"""Published checkpoints, in any of their layouts, into this project's models."""

from lightning_modules.checkpoints.loading import LoadReport, load_clip_checkpoint, read_checkpoint

__all__ = ["LoadReport", "load_clip_checkpoint", "read_checkpoint"]
