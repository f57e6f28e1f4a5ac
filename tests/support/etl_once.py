"""One etl in a process of its own: `python -m tests.support.etl_once DATA OUT '{"workers": 2, "poison": {...}}'`.

Ends as `omni etl` does: with its exit codes, its error in one line, and the result as JSON. Its recipe is quick to
import: a worker, or a machine with a fault, starts it often.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import ClassVar

from omni_cli.config import Settings
from omni_cli.errors import OmniError
from omni_cli.formats.video import decoder_id
from omni_cli.recipe import SplitSettings
from omni_cli.report import Console
from omni_cli.samples.tables import EGO_MOTION_COLUMNS
from omni_cli.samples.windows import TableMaker
from omni_cli.stages.etl import EtlRequest, etl
from tests.support.drives import preprocess
from tests.support.folders import tree
from tests.support.poison import poisoned_tables, poisoned_windows


class Sample(Settings):
    stride: int = 4
    rate_hz: float = 10.0
    camera: str = "qcamera"


class Quick(Settings):
    """Only shards, and no tokens; `poison` says which recordings are hostile, and how."""

    name: ClassVar[str] = "quick"
    poison: dict[str, str]
    sample: Sample = Sample()
    split: SplitSettings = SplitSettings(validation=0.34)

    def preprocess(self):
        return preprocess(
            cameras=(self.sample.camera,),
            columns=1,
            canvas_width_px=56,
            rate_hz=self.sample.rate_hz,
            decoder_id=decoder_id("pyav"),
        )

    def target_columns(self):
        return EGO_MOTION_COLUMNS

    def table_maker(self):
        how = {"poison": self.poison, "stride": self.sample.stride}
        return TableMaker(partial(poisoned_windows, **how), partial(poisoned_tables, **how))

    def notes(self):
        return ("a note of the recipe",)


def run(data: Path, out: Path, *, poison: dict[str, str] | None = None, quiet: bool = False, **options) -> dict:
    sample = Sample(**{name: options.pop(name) for name in Sample.model_fields if name in options})
    request = EtlRequest(data=data, out=out, **{"max_refused": 0.5, **options})
    return etl(Quick(poison=poison or {}, sample=sample), request, Console(quiet=quiet))


def command(data: Path, out: Path, **options) -> list[str]:
    """What runs such a process."""
    return [sys.executable, "-m", "tests.support.etl_once", str(data), str(out), json.dumps(options)]


def undisturbed(data: Path, folder: Path) -> dict[str, str]:
    """The hashes of the shards that are made where nothing goes wrong."""
    run(data, folder / "shards", workers=0, quiet=True)
    return tree(folder / "shards")


def main(data: str, out: str, options: dict) -> int:
    if "shard" in options:
        options["shard"] = tuple(options["shard"])
    try:
        sys.stdout.write(json.dumps(run(Path(data), Path(out), **options)) + "\n")
    except OmniError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
