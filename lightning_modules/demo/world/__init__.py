"""The demo world: small videos of objects being handled, with annotations in the field's formats.

See `docs/demo.md`. `vocabulary` says what can happen, `scene` what happens in one segment,
`draw` how it looks and `world` writes the files.
"""

from lightning_modules.demo.world.scene import Scene, sample_scene
from lightning_modules.demo.world.world import DemoWorld, WorldOptions, build_world

__all__ = ["DemoWorld", "Scene", "WorldOptions", "build_world", "sample_scene"]
