"""From settings to the frozen preprocessing and the teacher, and windows that no shard holds."""

from collections.abc import Iterator, Sequence
from itertools import compress

import numpy as np
import torch

from omni_cli.errors import DataError, UsageError
from omni_cli.formats import video
from omni_cli.formats.driving_model import NUM_POINTS
from omni_cli.formats.physical_ai_av import expand_cameras
from omni_cli.recipe import Asked, Questions
from omni_cli.recipes.distill.rows import unlabelled
from omni_cli.recipes.distill.settings import DistillSample
from omni_cli.recipes.distill.teaching import identity
from omni_cli.samples.driven_path import driven_paths
from omni_cli.samples.driving_pictures import window_pictures
from omni_cli.samples.driving_windows import UNPAIRED, per_view
from omni_cli.samples.model_steps import ModelFramePreprocess
from omni_cli.samples.model_views import known_calibration
from omni_cli.samples.step_labels import desire_pulses
from omni_cli.samples.sync import PlannedWindow
from omni_cli.samples.views import has_motion
from omni_cli.samples.windows import camera_streams, plan_cameras
from omni_cli.scene.recording import Recording

_MAX_CAMERAS = 2


def driving_preprocess(sample: DistillSample) -> ModelFramePreprocess:
    """Return the preprocessing that a [sample] table asks for.

    Raises:
        UsageError: there are no cameras or more than two.
    """
    cameras = expand_cameras(sample.cameras)
    if not 1 <= len(cameras) <= _MAX_CAMERAS:
        raise UsageError(f"cameras {sample.cameras!r}: expected the road camera, or the road and the wide one")
    return ModelFramePreprocess(
        cameras=cameras,
        num_frames=sample.window,
        rate_hz=sample.rate_hz,
        sampling=sample.sampling,
        teacher=identity(sample.teacher),
        require_calibrated=sample.require_calibrated,
        require_fix=sample.require_fix,
        decoder_id=video.decoder_id("pyav"),
    )


def questions(recording: Recording, preprocess: ModelFramePreprocess, stride: int, max_age_us: int) -> Questions:
    """Return the windows of a calibrated recording; pictures are decoded while they are asked for.

    Raises:
        DataError: a camera or its calibration is missing, no window is left, or two cameras are never exposed together.
    """
    for stream in camera_streams(recording, preprocess.cameras).values():
        known_calibration(recording, stream)
    plan = plan_cameras(recording, preprocess.cameras, preprocess, stride=stride, max_age_us=max_age_us)
    if not plan.windows:
        needed = f"{preprocess.num_frames} frames at {preprocess.rate_hz:g} Hz"
        raise DataError(f"{recording.id}: holds no window of {needed}; lower --stride, or take a longer recording")
    windows, is_paired = per_view(recording, plan.windows, preprocess)
    dropped = plan.dropped if all(is_paired) else {**plan.dropped, UNPAIRED: is_paired.count(False)}
    asked = _asked(recording, preprocess, list(compress(windows, is_paired)))
    return Questions(sum(is_paired), asked, dropped)


def _asked(recording: Recording, preprocess: ModelFramePreprocess, windows: Sequence[PlannedWindow]) -> Iterator[Asked]:
    device = recording.device
    for window, pictures in zip(windows, window_pictures(recording, preprocess, windows), strict=True):
        times_us = window.timestamp_us[1:, 0]
        row = {
            "pictures": torch.from_numpy(pictures),
            "desire_pulse": torch.from_numpy(desire_pulses(device.desire if device else None, window.instants_us[1:])),
            "left_hand_traffic": int(bool(device and device.is_right_hand_drive)),
            **unlabelled(preprocess.steps),
        }
        yield Asked(window, row, _truth(recording, preprocess, times_us))


def _truth(recording: Recording, preprocess: ModelFramePreprocess, times_us: np.ndarray) -> dict[str, object]:
    """Return the path truly driven, NaN where the log does not reach; nothing where the motion is not known."""
    turn = recording.device.yaw_rate if recording.device else None
    if not has_motion(recording) or (recording.ego is None and turn is None):
        return {}
    driven = driven_paths(recording, times_us, camera=preprocess.cameras[0])
    is_known = np.arange(NUM_POINTS) < driven.num_points[:, None]
    return {"xy_m": np.where(is_known[..., None], driven.xy_m, np.nan), "is_truth": True}
