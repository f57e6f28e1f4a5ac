"""`omni bench`: how fast each stage is on this machine.

Everything is synchronised with the device, warmed up and repeated; what is compared runs in turn in one process.
"""

from omni_cli.stages.bench.rows import RowsRequest, bench_gpu
from omni_cli.stages.bench.stage import PARTS, BenchRequest, bench
from omni_cli.stages.bench.texture import FULL_HD

__all__ = ["FULL_HD", "PARTS", "BenchRequest", "RowsRequest", "bench", "bench_gpu"]
