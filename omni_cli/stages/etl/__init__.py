"""`omni etl`: from recordings to shards. plan -> run_unit (one recording) -> receipt -> finalize.

A unit is a pure function of its inputs and the settings, so that killing, repeating, sharing out or reordering units
never changes a byte of the result.
"""

from omni_cli.stages.etl.request import EtlRequest
from omni_cli.stages.etl.sidecar import ensure_sidecar
from omni_cli.stages.etl.stage import etl

__all__ = ["EtlRequest", "ensure_sidecar", "etl"]
