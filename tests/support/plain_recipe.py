"""A recipe that only makes shards and counts for tokens: no model, no tokenizer, quick to import in a worker."""

from functools import partial
from typing import ClassVar

import numpy as np
import pyarrow as pa

from omni_cli.config import Settings
from omni_cli.files import hash_json
from omni_cli.formats.video import decoder_id
from omni_cli.recipe import SplitSettings
from omni_cli.recipes.vlm.settings import VlmSample
from omni_cli.samples.tables import EGO_MOTION_COLUMNS
from omni_cli.samples.windows import TableMaker, choose_windows, ego_motion_tables
from tests.support.drives import preprocess

SAMPLE = VlmSample(cameras="qcamera", window=8, stride=4, rate_hz=10.0, canvas_px=56)


class Plain(Settings):
    name: ClassVar[str] = "plain"
    sample: VlmSample = SAMPLE
    split: SplitSettings = SplitSettings(validation=0.34)

    def preprocess(self):
        return preprocess(
            cameras=tuple(self.sample.cameras.split(",")),
            columns=1,
            canvas_width_px=self.sample.canvas_px,
            canvas_height_px=56,
            num_frames=self.sample.window,
            rate_hz=self.sample.rate_hz,
            decoder_id=decoder_id("pyav"),
        )

    def target_columns(self):
        return EGO_MOTION_COLUMNS

    def table_maker(self):
        how = {"stride": self.sample.stride, "max_age_us": 100_000}
        return TableMaker(partial(choose_windows, **how), partial(ego_motion_tables, **how))

    def notes(self):
        return ()

    max_tokens: ClassVar[int] = 100

    def sidecar_key(self, preprocess):
        return hash_json(preprocess.model_dump(mode="json"))[:16]

    def encode_windows(self, windows, preprocess):
        ids = [[round(speed * 100), 7] for speed in windows["mean_speed_mps"].to_pylist()]
        schema = pa.schema([(name, pa.list_(pa.int32())) for name in ("input_ids", "labels", "position_ids")])
        columns = [ids, ids, [list(np.arange(8)) for _ in ids]]
        return pa.table(dict(zip(schema.names, columns, strict=True)), schema=schema)
