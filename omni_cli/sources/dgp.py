"""TRI's DGP scenes, as DDAD is published in: images of several cameras, each with its own time and pose.

An image is a video of one frame. How the car moved is what the poses of the images say, turned into the rig by the
calibration; the cameras must agree on it. Speeds follow from positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from scipy.spatial.transform import Rotation

from omni_cli.errors import DataError, UsageError
from omni_cli.formats import dgp as layout
from omni_cli.formats import video
from omni_cli.scene.cameras import Calibration, Pinhole
from omni_cli.scene.clock import MICROSECONDS_PER_SECOND, Float64Array, Int64Array
from omni_cli.scene.poses import EgoMotion, Pose
from omni_cli.scene.recording import CameraStream, Recording
from omni_cli.sources import RecordingRef
from omni_cli.sources.noted import check_noted, located, read_noted

_AGAIN = "copy the whole scene and fetch again"
_LICENCE = "of the data set: MIT of DGP's test scenes, CC BY-NC-SA 4.0 of DDAD"
_MAX_QUATERNION_ERROR = 1e-3
_MOVES_MPS = 1.0  # below it a curvature would be noise over nothing
# What cameras that were exposed together may differ by in where they place the car.
_MAX_APART_M, _MAX_APART_RAD = 0.05, 0.01


class Dgp:
    """A folder of scenes. One recording is one scene; which drive it is of is not published."""

    known_cameras: ClassVar[tuple[str, ...]] = layout.CAMERAS

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def recordings(self) -> tuple[RecordingRef, ...]:
        """Return every scene, by name.

        Raises:
            DataError: the folder holds no scene, or two of one name.
        """
        return tuple(RecordingRef(id=name, group=name, bundle=name) for name in sorted(self._scenes))

    def open(self, recording_id: str, cameras: tuple[str, ...] | None = None) -> Recording:
        """Open one scene with the cameras asked for (None: every camera that is there).

        Raises:
            DataError: a file is missing or damaged, a camera is no pinhole, or the poses disagree.
            UsageError: no such camera exists in this scene nor in DDAD.
        """
        if recording_id not in self._scenes:
            raise DataError(f"{self._folder}: holds no scene {recording_id}; `omni audit` lists what is there")
        scene = _Scene.read(recording_id, self._scenes[recording_id])
        streams = {name: scene.stream(name) for name in _wanted(cameras, scene.images)}
        ego, provenance = _ego_motion(scene), {"licence": _LICENCE, "times": scene.times}
        return Recording(
            id=recording_id, source="dgp", cameras=streams, ego=ego, group=recording_id, provenance=provenance
        )

    @cached_property
    def _scenes(self) -> Mapping[str, Path]:
        if not self._folder.is_dir():
            raise DataError(f"no folder {self._folder}; `omni fetch --source dgp --from SCENES` makes it")
        found: dict[str, Path] = {}
        for path in sorted(self._folder.absolute().rglob("scene_*.json")):
            parsed = layout.parse_scene_file(path.as_posix())
            if parsed is None or not layout.is_scene_json(parsed[1]):
                continue
            if (first := found.setdefault(parsed[0], path)) != path:
                raise DataError(f"{first} and {path} are both of scene {parsed[0]}; keep one")
        if not found:
            raise DataError(
                f"{self._folder}: holds no scene such as 000150/scene_HASH.json; "
                "`omni fetch --source dgp --from SCENES` imports some"
            )
        return found


@dataclass(frozen=True)
class _Picture:
    time_us: int
    image: layout.Image


@dataclass(frozen=True)
class _Scene:
    """A scene's images by camera, in order of time, and its calibration."""

    name: str
    folder: Path
    images: Mapping[str, Sequence[_Picture]]
    calibration: layout.Calibration
    times: str  # how they are stated

    @classmethod
    def read(cls, name: str, path: Path) -> "_Scene":
        check_noted(path)
        scene = layout.read_json(path, layout.Scene)
        images: dict[str, list[_Picture]] = {}
        for datum in scene.data:
            if (image := datum.datum.image) is not None:
                time_us = layout.microseconds(datum.id.timestamp)
                images.setdefault(datum.id.name, []).append(_Picture(time_us, image))
        for pictures in images.values():
            pictures.sort(key=lambda picture: picture.time_us)
        if not images:
            raise DataError(f"{name}: lists no image; {_AGAIN}")
        is_tenfold = any(layout.is_tenfold(one.id.timestamp) for one in scene.data if one.datum.image is not None)
        times = "stated tenfold, divided by ten" if is_tenfold else "as stated"
        return cls(name, path.parent, images, _calibration(name, path.parent, scene), times)

    def rig_T_camera(self, camera: str) -> Pose:
        """Return where a camera sits."""
        return _pose(self.calibration.extrinsics[self._number(camera)], f"{self.name} {camera}: extrinsics")

    def stream(self, camera: str) -> CameraStream:
        """Return the images of a camera as videos of one frame.

        Raises:
            DataError: two have one time, one is missing, or they are not of one size.
        """
        pictures = self.images[camera]
        times_us = np.array([picture.time_us for picture in pictures], dtype=np.int64)
        if (np.diff(times_us) <= 0).any():
            raise DataError(f"{self.name} {camera}: two images have the same time; {_AGAIN}")
        paths = [self._path(camera, picture.image) for picture in pictures]
        videos = tuple(located(path, num_frames=1) for path in paths)
        found = video.probe(read_noted(paths[0]), str(paths[0]))
        sizes_px = {(found.width_px, found.height_px), *((one.image.width, one.image.height) for one in pictures)}
        if len(sizes_px) > 1:
            raise DataError(f"{self.name} {camera}: has images of the sizes {sorted(sizes_px)}; {_AGAIN}")
        model = Pinhole(*sizes_px.pop(), *layout.pinhole(self.calibration.intrinsics[self._number(camera)]))
        return CameraStream(camera, videos, times_us, Calibration(model, self.rig_T_camera(camera)))

    def _number(self, camera: str) -> int:
        if camera not in self.calibration.names:
            raise DataError(f"{self.name} {camera}: has no calibration; {_AGAIN}")
        return self.calibration.names.index(camera)

    def _path(self, camera: str, image: layout.Image) -> Path:
        """Return the file of an image: one that lies in the scene's folder and is no larger than an image is."""
        path = self.folder / image.filename
        is_inside = path.resolve().is_relative_to(self.folder.resolve())
        if layout.parse_scene_file(f"scene/{image.filename}") is None or not is_inside:
            raise DataError(f"{self.name} {camera}: names the image {image.filename!r}, outside of its rgb folder")
        if not path.is_file():
            raise DataError(f"{path}: is missing; {_AGAIN}")
        if path.stat().st_size > layout.MAX_IMAGE_BYTES:
            raise DataError(f"{path}: is larger than {layout.MAX_IMAGE_BYTES} bytes, as no image is; {_AGAIN}")
        return path


def _calibration(name: str, folder: Path, scene: layout.Scene) -> layout.Calibration:
    keys = {sample.calibration_key for sample in scene.samples}
    if len(keys) != 1:
        raise DataError(f"{name}: has {len(keys)} calibrations; expected one that holds for the whole scene")
    file = f"calibration/{keys.pop()}.json"
    if layout.parse_scene_file(f"scene/{file}") is None:
        raise DataError(f"{name}: names the calibration {file!r}, which is no hash; {_AGAIN}")
    check_noted(folder / file)
    read = layout.read_json(folder / file, layout.Calibration)
    if not len(read.names) == len(read.extrinsics) == len(read.intrinsics):
        raise DataError(f"{folder / file}: has lists of different lengths; {_AGAIN}")
    return read


def _pose(told: layout.RigidPose, what: str) -> Pose:
    turn, at = told.rotation, told.translation
    quaternion = np.array([turn.qx, turn.qy, turn.qz, turn.qw])
    if abs(np.linalg.norm(quaternion) - 1) > _MAX_QUATERNION_ERROR:
        raise DataError(f"{what} hold a quaternion that is not of length 1; {_AGAIN}")
    return Pose(Rotation.from_quat(quaternion), np.array([at.x, at.y, at.z]))


def _wanted(cameras: tuple[str, ...] | None, there: Mapping[str, Sequence[_Picture]]) -> tuple[str, ...]:
    known = {*layout.CAMERAS, *there}
    if unknown := set(cameras or ()) - known:
        raise UsageError(f"no camera {sorted(unknown)[0]!r} in DGP scenes; known: {', '.join(sorted(known))}")
    return tuple(name for name in (sorted(there) if cameras is None else cameras) if name in there)


def _ego_motion(scene: _Scene) -> EgoMotion:
    """Return where the car was at the time of each image; the anchor's axes are the world's, its origin is the first.

    Raises:
        DataError: images taken together disagree, or there is but one instant.
    """
    poses: dict[int, Pose] = {}
    for camera, time_us, world_T_rig in _rig_poses(scene):
        first = poses.setdefault(time_us, world_T_rig)
        apart_m = np.linalg.norm(first.translation_m - world_T_rig.translation_m)
        if apart_m > _MAX_APART_M or (first.rotation.inv() * world_T_rig.rotation).magnitude() > _MAX_APART_RAD:
            raise DataError(
                f"{scene.name} {camera}: places the car {apart_m:.2f} m from where other cameras do; {_AGAIN}"
            )
    if len(poses) < 2:
        raise DataError(f"{scene.name}: has images of one instant; a motion needs two")
    in_order = [pose for _, pose in sorted(poses.items(), key=lambda item: item[0])]
    position_m = np.stack([pose.translation_m for pose in in_order])
    turns = Rotation.concatenate([pose.rotation for pose in in_order])
    return _motion(np.array(sorted(poses), dtype=np.int64), position_m - position_m[0], turns)


def _rig_poses(scene: _Scene) -> Iterator[tuple[str, int, Pose]]:
    for camera, pictures in sorted(scene.images.items()):
        camera_T_rig = scene.rig_T_camera(camera).inverse()
        for picture in pictures:
            yield camera, picture.time_us, _pose(picture.image.pose, f"{scene.name} {camera}: poses") @ camera_T_rig


def _motion(time_us: Int64Array, position_m: Float64Array, anchor_R_rig: Rotation) -> EgoMotion:
    """Return the motion through poses (n); velocities are differences of positions, accelerations of those."""
    elapsed_s = (time_us - time_us[0]) / MICROSECONDS_PER_SECOND
    velocity_mps = np.gradient(position_m, elapsed_s, axis=0)
    speed_mps = np.linalg.norm(velocity_mps, axis=1)
    rows = np.arange(len(time_us))
    before, after = np.maximum(rows - 1, 0), np.minimum(rows + 1, len(rows) - 1)
    turn_rad = (anchor_R_rig[before].inv() * anchor_R_rig[after]).as_rotvec()[:, 2]
    yaw_rate_radps = turn_rad / (elapsed_s[after] - elapsed_s[before])
    return EgoMotion(
        timestamp_us=time_us,
        position_m=position_m,
        quaternion_xyzw=anchor_R_rig.as_quat(),
        velocity_mps=velocity_mps,
        acceleration_mps2=np.gradient(velocity_mps, elapsed_s, axis=0),
        curvature_per_m=np.where(speed_mps > _MOVES_MPS, yaw_rate_radps / np.maximum(speed_mps, _MOVES_MPS), 0),
    )
