"""The field's benchmarks behind one interface, and what is done with their similarities."""

from collections.abc import Callable

from lightning_modules.evaluation.benchmarks.charades_ego import CharadesEgo
from lightning_modules.evaluation.benchmarks.egohoi import EgoHOIBench
from lightning_modules.evaluation.benchmarks.egomcq import EgoMCQ
from lightning_modules.evaluation.benchmarks.ek100_bank import EK100Bank
from lightning_modules.evaluation.benchmarks.ek100_cls import EK100Recognition
from lightning_modules.evaluation.benchmarks.ek100_mir import EK100Retrieval
from lightning_modules.evaluation.benchmarks.text_video import TextVideoRetrieval
from lightning_modules.evaluation.interface import Benchmark, BenchmarkData, Measured

BENCHMARKS: dict[str, Callable[[BenchmarkData], Benchmark]] = {
    benchmark.name: benchmark
    for benchmark in (
        EK100Retrieval,
        EK100Recognition,
        EK100Bank,
        EgoMCQ,
        EgoHOIBench,
        CharadesEgo,
        TextVideoRetrieval,
    )
}

__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkData", "Measured"]
