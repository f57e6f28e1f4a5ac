"""How the exported programs answer, with ONNX Runtime, numpy and tokenizers alone: an example for a model card."""

from omni_cli.samples.tiling import TiledPreprocess

HERE = "."
_BEGIN = """\
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer

{folder}
tower, decoder = (InferenceSession(next(folder.glob(name))) for name in ("vision*.onnx", "decoder.onnx"))
told = decoder.get_modelmeta().custom_metadata_map
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
inputs = {{one.name: one for one in decoder.get_inputs()}}
dtype = np.float16 if "float16" in tower.get_inputs()[0].type else np.float32

# one window: {frames} RGB canvases, {rate_hz:g} a second, the cameras in the cells that are told above
canvases = np.zeros(({frames}, {height}, {width}, 3), np.uint8)
prompt = tokenizer.encode(told["omni_prompt"], add_special_tokens=False).ids  # its words may be others
pixels = (canvases - np.multiply(255, {mean})) / np.multiply(255, {std})
"""
_OF_PATCHES = """\
pixels = np.concatenate([pixels, pixels[-1:]])[: {time} * {temporal}]
time, rows, columns, side = {time}, {rows}, {columns}, {merge}  # tokens, each of {merge} x {merge} patches
patches = pixels.reshape(time, {temporal}, rows, side, {patch}, columns, side, {patch}, 3)
pixels = patches.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(time * rows * columns * side**2, -1)

# positions in time, height and width: text counts on from the largest before it, tokens of pictures form grids
ids, ends = np.array(prompt), np.flatnonzero(np.diff(np.equal(prompt, int(told["omni_video_token"])))) + 1
places, begin = [], 0
for part in np.split(ids, ends):
    here = np.tile(np.arange(len(part)), (3, 1))
    if part[0] == int(told["omni_video_token"]):
        here = np.indices((len(part) // (rows * columns), rows, columns)).reshape(3, -1)
        here[0] = here[0] * float(told["omni_time_step"])
    places.append(here + begin)
    begin = places[-1].max() + 1
places = np.concatenate(places, axis=1)[:, None]
"""
_OF_FRAMES = """\
pixels = pixels.transpose(0, 3, 1, 2)[None]
places = np.arange(len(prompt))[None]
"""
_ANSWER = """
windows = tower.get_inputs()[0].shape[0]  # that this tower looks at; here all are the same
windows = windows // len(pixels) if isinstance(windows, int) else 1
seen = tower.run(None, {"pixel_values": np.concatenate([pixels] * windows).astype(dtype)})
seen = dict(zip([one.name for one in tower.get_outputs()], seen))
past = {name: np.zeros((windows, one.shape[1], 0, one.shape[3]), dtype)
        for name, one in inputs.items() if name.startswith("past_key_values")}
ids, places = np.array([prompt] * windows), np.repeat(places, windows, axis=-2)
mask, said = np.ones_like(ids), []
while len(said) < int(told["omni_max_tokens"]):
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": places, **seen, **past}
    logits, *present = decoder.run(None, given)
    ids, places = logits.argmax(-1)[:, None], places[..., -1:] + 1
    said.append(ids[:, 0])
    if (np.array(said) == int(told["omni_end_token"])).any(0).all():
        break
    mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
    past = dict(zip(past, present))
    seen = {name: values[:0] for name, values in seen.items()}  # only the prompt has tokens of pictures
for row in np.transpose(said).tolist():
    print(tokenizer.decode(row[: (row + [int(told["omni_end_token"])]).index(int(told["omni_end_token"]))]))
"""


def by_onnxruntime(preprocess: TiledPreprocess, source: str) -> str:
    """Return a Python program that answers about one window.

    Args:
        preprocess: of the model.
        source: the folder of the programs, or its name on a hub.
    """
    vision, grid = preprocess.vision, preprocess.grid
    here = 'folder = Path(".")'
    hub = f'from huggingface_hub import snapshot_download\n\nfolder = Path(snapshot_download("{source}"))'
    values = {
        "folder": here if source == HERE else hub,
        "frames": preprocess.num_frames,
        "rate_hz": preprocess.rate_hz,
        "height": preprocess.canvas_height_px,
        "width": preprocess.canvas_width_px,
        "mean": list(vision.mean),
        "std": list(vision.std),
        "time": grid[0],
        "rows": grid[1] // vision.merge,
        "columns": grid[2] // vision.merge,
        "merge": vision.merge,
        "temporal": vision.temporal_patch,
        "patch": vision.patch_px,
    }
    look = _OF_PATCHES if vision.reads == "patches" else _OF_FRAMES
    return (_BEGIN + look).format(**values) + _ANSWER
