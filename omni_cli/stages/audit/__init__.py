"""omni audit: find and name what is wrong with raw data, shards, runs and exports, before anything learns from it.

What is found is told once a kind, with examples, in full as JSON, and as a page with pictures. `--quarantine` sets what
is refused aside, so that every later stage leaves it out; nothing is deleted, and `--restore` undoes it.

    without --deep   zip directories, tables, video indices, sizes, receipts, manifests, exact duplicates
    --deep           also every frame decoded and looked at, every CRC and hash, duplicates to the eye
    --subset 5%      the same of a part that the names' hashes choose
"""

from omni_cli.stages.audit.aside import restore_all
from omni_cli.stages.audit.stage import AuditRequest, audit

__all__ = ["AuditRequest", "audit", "restore_all"]
