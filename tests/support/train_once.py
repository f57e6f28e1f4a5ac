"""Train in a process of its own, so that it can be killed: RUNS SHARDS FAMILY MODE SCHEDULE STEPS [WORKERS]."""

import sys
from pathlib import Path

from omni_cli.__main__ import INTERRUPTED
from omni_cli.errors import OmniError
from omni_cli.stages.train import TrainRequest, train
from tests.support.pipeline import QUIET, kill_recipe

if __name__ == "__main__":
    runs, shards, family, mode, schedule, *numbers = sys.argv[1:]
    recipe = kill_recipe(family, mode, schedule, *map(int, numbers))
    try:
        train(recipe, TrainRequest(Path(shards), Path(runs), Path(runs), "r", "t"), QUIET)
    except OmniError as error:
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
