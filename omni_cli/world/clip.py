"""One synthetic clip before it becomes files: its drive, its car's cameras, and when each of them takes a picture.

Every random number comes from (seed, chunk, index) and from what it is for, so a clip is the same whoever makes it,
in whatever order, and a camera's pictures do not depend on which other cameras are asked for.
"""

import math
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from omni_cli.errors import UsageError
from omni_cli.formats.physical_ai_av import CAMERAS
from omni_cli.scene.cameras import Calibration, FTheta
from omni_cli.scene.clock import Int64Array
from omni_cli.world.motion import Drive, random_drive, winding_drive
from omni_cli.world.render import Uint8Array, World, build_world, camera_view, render
from omni_cli.world.rig import RIGS, random_rig

_GOLDEN = (5**0.5 - 1) / 2
_MAX_JITTER_US = 50
ROADS = ("gentle", "winding")
LinearTerm = tuple[float, float, float]
NO_LINEAR_TERM: LinearTerm = (1.0, 0.0, 0.0)
_PURPOSES = ("name", "drive", "world", "rig", "cameras", "split", "metadata")


@dataclass(frozen=True)
class SyntheticSpec:
    """What a synthetic data set is made of.

    Raises:
        UsageError: a picture that is not 16:9, an unknown camera or rig, or a length or rate that is not positive.
    """

    seed: int = 0
    clips_per_chunk: int = 4
    seconds: float = 20.0
    fps: int = 30
    width_px: int = 320
    height_px: int = 180
    cameras: tuple[str, ...] = CAMERAS
    rig: str = "mixed"
    clutter: float = 1.0  # 0..1: how much stands and drives beside the road
    roads: str = "gentle"  # or winding: a car that slows for the bends it sees

    def __post_init__(self) -> None:
        """Refuse what cannot be rendered."""
        if self.width_px % 2 or self.height_px % 2 or abs(self.width_px * 9 - self.height_px * 16) > 16:
            raise UsageError(f"pictures of {self.width_px}x{self.height_px} px: expected even sides at 16:9 (320x180)")
        if unknown := [camera for camera in self.cameras if camera not in CAMERAS]:
            raise UsageError(f"unknown camera {unknown[0]!r}; known: {', '.join(CAMERAS)}")
        if self.rig not in (*RIGS, "mixed"):
            raise UsageError(f"unknown rig {self.rig!r}; known: {', '.join((*RIGS, 'mixed'))}")
        if not 0 <= self.clutter <= 1:
            raise UsageError(f"clutter {self.clutter}: expected 0 (an empty road) to 1 (a town)")
        if self.roads not in ROADS:
            raise UsageError(f"unknown roads {self.roads!r}; known: {', '.join(ROADS)}")
        if not 2 <= self.seconds * self.fps < math.inf or not 1 <= self.clips_per_chunk <= 100:
            raise UsageError("a synthetic clip needs two frames or more, and a chunk holds 1 to 100 clips")


@dataclass(frozen=True)
class Clip:
    """A clip that is ready to be rendered."""

    world: World
    rig: str
    calibrations: Mapping[str, Calibration]
    timestamp_us: Mapping[str, Int64Array]  # by camera; strictly increasing, each camera on its own phase

    @property
    def drive(self) -> Drive:
        """Return how the car moves."""
        return self.world.drive

    def frames(self, camera: str) -> Iterator[Uint8Array]:
        """Yield one camera's (height, width, 3) pictures, each of the world at its own timestamp."""
        view = camera_view(self.world, self.calibrations[camera])
        for at_us in self.timestamp_us[camera].tolist():
            yield render(self.world, view, at_us)


def generator(spec: SyntheticSpec, chunk: int, index: int, purpose: str) -> np.random.Generator:
    """Return the random generator of one purpose of one clip."""
    return np.random.default_rng(np.random.SeedSequence([spec.seed, chunk, index, _PURPOSES.index(purpose)]))


def clip_id(spec: SyntheticSpec, chunk: int, index: int) -> str:
    """Return a clip's name, a random UUID that says nothing about the clip."""
    raw = generator(spec, chunk, index, "name").bytes(16)
    return str(uuid.UUID(bytes=raw, version=4))


def rig_of(spec: SyntheticSpec, chunk: int, index: int) -> str:
    """Return which of the two rigs a clip's car has."""
    return str(generator(spec, chunk, index, "rig").choice(RIGS)) if spec.rig == "mixed" else spec.rig


def build_clip(spec: SyntheticSpec, chunk: int, index: int, linear_cde: LinearTerm = NO_LINEAR_TERM) -> Clip:
    """Make a clip's drive, world and cameras, whose lenses are sheared by a linear term (FTheta tells how)."""
    drive = build_drive(spec, chunk, index)
    rig = rig_of(spec, chunk, index)
    cameras = generator(spec, chunk, index, "cameras")
    calibrations = random_rig(cameras, rig, width_px=spec.width_px, height_px=spec.height_px, cameras=spec.cameras)
    if linear_cde != NO_LINEAR_TERM:
        calibrations = {camera: _sheared(found, linear_cde) for camera, found in calibrations.items()}
    times = {camera: _timestamps(cameras, spec) for camera in CAMERAS}
    world = build_world(generator(spec, chunk, index, "world"), drive, spec.clutter)
    return Clip(world, rig, calibrations, {camera: times[camera] for camera in spec.cameras})


def _sheared(calibration: Calibration, linear_cde: LinearTerm) -> Calibration:
    assert isinstance(calibration.model, FTheta)
    return replace(calibration, model=replace(calibration.model, linear_cde=linear_cde))


def build_drive(spec: SyntheticSpec, chunk: int, index: int) -> Drive:
    """Return how the car of a clip moves."""
    shift = np.random.default_rng(np.random.SeedSequence([spec.seed])).random()
    phase = (shift + (chunk * spec.clips_per_chunk + index) * _GOLDEN) % 1  # spreads the first speeds of a set evenly
    rng = generator(spec, chunk, index, "drive")
    if spec.roads == "winding":
        return winding_drive(rng, seconds=spec.seconds)
    return random_drive(rng, seconds=spec.seconds, start_phase=phase)


def _timestamps(rng: np.random.Generator, spec: SyntheticSpec) -> Int64Array:
    period_us = 1_000_000 / spec.fps
    number = np.arange(int(spec.seconds * spec.fps))
    phase_us = rng.uniform(0, period_us - _MAX_JITTER_US - 1)
    return np.asarray(number * period_us + phase_us + rng.integers(0, _MAX_JITTER_US + 1, len(number)), np.int64)
