"""The demo's report: one self-contained HTML page of figures, charts, pictures and clips."""

from lightning_modules.demo.report.gallery import gallery_rows
from lightning_modules.demo.report.page import write_report
from lightning_modules.demo.report.results import DemoResults

__all__ = ["DemoResults", "gallery_rows", "write_report"]
