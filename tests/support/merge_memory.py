"""Merge an adapter into a base of 160 million weights in a process of its own; print its growth and what was foretold.

Arguments: an empty folder, and the mode of the adapter. The growth is the kernel's, with the files that are mapped.
"""

import sys
from pathlib import Path

from omni_cli.models import tiny
from omni_cli.stages import merge as merge_stage
from omni_cli.stages.merge import MergeRequest, merge
from omni_cli.stages.resident import forget_peak, give_back, peak_bytes
from tests.support.pipeline import QUIET
from tests.test_merge_parity import a_recipe, learned


def main() -> None:
    """Print both in bytes."""
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    tiny._HIDDEN, tiny._INNER, tiny._LAYERS, tiny._MROPE, tiny._INITIAL_STD = 1024, 4096, 8, [32, 48, 48], 0.02
    whole = a_recipe("qwen2_5_vl", "full", "bfloat16")
    whole.save(whole.build(whole.preprocess()), folder / "base")
    recipe = a_recipe("qwen2_5_vl", mode, "bfloat16", model=str(folder / "base"))
    run = learned(folder / "run", recipe, rate=0.002)
    foretold: list[float] = []
    merge_stage.warn_of_more = lambda needed_bytes, *_: foretold.append(needed_bytes)
    give_back()
    before = forget_peak()
    merge(recipe, run, MergeRequest(), QUIET)
    sys.stdout.write(f"{peak_bytes() - before} {int(foretold[0])}\n")


main()
