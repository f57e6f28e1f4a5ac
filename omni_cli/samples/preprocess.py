"""How pictures become model inputs: one frozen object that etl, train, eval, infer and export share.

It is made once, at etl, saved in the shard manifest, and copied from there into every run and export. There is one kind
for each way of looking; all of them say which views are stored at an instant and what shape their pictures have, so
that no stage asks which it is. A window's pictures are (num_frames, views, *picture_shape) of uint8.
"""

from typing import Annotated

from pydantic import Field

from omni_cli.samples.model_steps import ModelFramePreprocess
from omni_cli.samples.tiling import TiledPreprocess

Preprocess = Annotated[TiledPreprocess | ModelFramePreprocess, Field(discriminator="kind")]
