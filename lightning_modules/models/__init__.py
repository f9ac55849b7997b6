"""EVA02-AT and its baselines as plain torch modules."""

from lightning_modules.models.classifier import VideoClassifier
from lightning_modules.models.config import (
    PRESETS,
    DualEncoderConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from lightning_modules.models.dual_encoder import DualEncoder, build_dual_encoder
from lightning_modules.models.text import TextEncoder
from lightning_modules.models.vision import VideoEncoder

__all__ = [
    "PRESETS",
    "DualEncoder",
    "DualEncoderConfig",
    "ModelConfig",
    "TextConfig",
    "TextEncoder",
    "VideoClassifier",
    "VideoEncoder",
    "VisionConfig",
    "build_dual_encoder",
]
