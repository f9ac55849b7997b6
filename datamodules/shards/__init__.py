"""From annotations and videos to shards: layouts, trimming, writing, checking."""

from datamodules.shards.build import BuildReport, build_shards
from datamodules.shards.index import index_tars
from datamodules.shards.layouts import LAYOUTS, VideoLayout
from datamodules.video.encode import EncodeOptions

__all__ = ["LAYOUTS", "BuildReport", "EncodeOptions", "VideoLayout", "build_shards", "index_tars"]
