"""The video tower as a classifier of actions."""

from __future__ import annotations

from torch import Tensor

from lightning_modules.models.config import DualEncoderConfig
from lightning_modules.models.towers import Towers
from lightning_modules.models.vision import VideoEncoder


class VideoClassifier(Towers):
    """A dual encoder's video tower whose projection gives logits of classes.

    Args:
        config: The dual encoder's.
        num_classes: C.
    """

    def __init__(self, config: DualEncoderConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.visual = VideoEncoder(
            config.vision,
            num_classes,
            attention_backend=config.attention_backend,
            activation_checkpointing=config.activation_checkpointing,
        )
        if config.compile_blocks:
            self.compile_blocks()

    def start_from(self, pretrained: VideoEncoder) -> None:
        """Take the weights of a tower of the same config, all but its projection."""
        weights = {
            name: tensor
            for name, tensor in pretrained.state_dict().items()
            if not name.startswith("head.")
        }
        self.visual.load_state_dict(weights, strict=False)

    def forward(self, video: Tensor) -> Tensor:
        """Classify clips.

        Args:
            video: (B, 3, T, H, W), normalised float or uint8 (normalised inside).

        Returns:
            (B, C) logits, float32 at least.
        """
        logits = self.visual(video)
        return logits if logits.element_size() >= 4 else logits.float()
