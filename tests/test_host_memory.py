"""Counted by the kernel: the pages that it clears for blocks which come and go."""

import platform
import subprocess
import sys

import pytest

from omni_cli.stages import models

CODE = """
import resource, sys
import torch
from omni_cli.models.host_memory import keep_freed_blocks
if sys.argv[1] == "kept":
    keep_freed_blocks()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def come_and_go():
    torch.ones(16_000_000)
for _ in range(20):
    come_and_go()  # until there are blocks to use again
before = faults()
for _ in range(10):
    come_and_go()
print(faults() - before)
"""


def faults_of_ten_blocks(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_only_a_model_on_the_cpu_has_it_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(models, "keep_freed_blocks", lambda: calls.append("kept"))
    assert models.ready_device("cuda") == "cuda"
    assert not calls
    assert models.ready_device("cpu") == "cpu"
    assert calls == ["kept"]
    assert models.ready_device() == models.best_device()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_block_that_was_freed_is_used_again() -> None:
    """Ten times 64 MB; a page is 4 KB, or 2 MB where the kernel takes large ones."""
    assert faults_of_ten_blocks("kept") * 10 < faults_of_ten_blocks("as the library does")
