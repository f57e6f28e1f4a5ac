"""The loader: pictures where they belong whatever lies beside them, uint8 all the way, and no damaged byte unseen."""

import gc
import os
import re
import resource
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omni_cli.errors import DataError, OmniError
from omni_cli.files import commit
from omni_cli.recipe import BuiltModel
from omni_cli.samples.dataset import ALL, WindowDataset
from omni_cli.samples.mapped import is_cached
from omni_cli.samples.shards import frames_path, open_shards, tokens_path, windows_path, write_stream
from omni_cli.samples.tables import FRAME_ROWS_PER_BATCH, FRAMES, Frames, ShardTables, windows_schema
from omni_cli.stages.bench.loader import chosen_records, forget
from omni_cli.stages.etl import EtlRequest, ensure_sidecar, etl
from omni_cli.stages.train import make_trainer
from tests.support.drives import preprocess
from tests.support.driving import tiny_student, write_drives
from tests.support.injection import needs_strace, run_traced
from tests.support.pipeline import QUIET, tiny_recipe, write_synthetic
from tests.support.shard_sets import write_shard_set

LAYOUT = preprocess(
    cameras=tuple(f"camera_{number}" for number in range(7)), columns=3, canvas_width_px=112, canvas_height_px=84
)
CELL = LAYOUT.picture_shape
CELL_BYTES = 37 * 28 * 3
STORED = 40  # pictures a camera: more than a batch of the file


def noise_set(folder, seed, names=("a",), windows=6):
    """Shards of noise: windows whose instants skip pictures, and show some twice."""
    rng = np.random.default_rng(seed)
    tables, rows = {}, {}
    for name in names:
        pictures = [[rng.bytes(CELL_BYTES) for _ in range(STORED)] for _ in LAYOUT.cameras]
        frames = pa.table(
            [
                [camera for camera in LAYOUT.cameras for _ in range(STORED)],
                list(range(STORED)) * 7,
                list(range(STORED)) * 7,
                *([side] * 7 * STORED for side in (37, 28)),
                [picture for of_camera in pictures for picture in of_camera],
            ],
            schema=FRAMES,
        )
        shown = np.sort(rng.integers(0, STORED, (windows, LAYOUT.num_frames, 7)), axis=1)
        shown[0] = np.arange(28, 28 + LAYOUT.num_frames)[:, None]  # side by side, over the end of a batch
        flat = [(window + np.arange(7) * STORED).ravel() for window in shown]
        columns = [range(windows), range(windows), range(windows), ["train"] * windows, flat, flat, [0] * windows]
        table = pa.table([*map(list, columns), [0] * windows], schema=windows_schema(()))
        tables[name] = ShardTables(Frames(len(frames), partial(batches, frames)), table)
        rows[name] = [expected(pictures, window) for window in shown]
    return write_shard_set(folder, tables, LAYOUT), rows


def batches(frames):
    return iter(frames.combine_chunks().to_batches(max_chunksize=FRAME_ROWS_PER_BATCH))


def expected(pictures, window):
    shown = [[pictures[camera][row] for camera, row in enumerate(instant)] for instant in window]
    return np.frombuffer(b"".join(b"".join(of) for of in shown), np.uint8).reshape(LAYOUT.num_frames, 7, *CELL).copy()


@pytest.mark.parametrize("seed", range(4))
def test_pictures_lie_where_they_belong(tmp_path, seed):
    folder, rows = noise_set(tmp_path, seed)
    dataset = WindowDataset(open_shards(folder), ALL)
    for index, pictures in enumerate(rows["a"]):
        assert torch.equal(dataset.pictures(index), torch.from_numpy(pictures))
        path, pieces = dataset.pieces(index)
        content = path.read_bytes()
        assert b"".join(content[piece] for piece in pieces) == pictures.swapaxes(0, 1).tobytes()  # view by view


def test_what_is_returned_is_the_callers_own(tmp_path):
    folder, _ = noise_set(tmp_path, 0)
    dataset = WindowDataset(open_shards(folder), ALL)
    row = dataset[1]
    row["pictures"].fill_(7)
    assert not torch.equal(dataset[1]["pictures"], row["pictures"])


@pytest.mark.fault("F5")
@pytest.mark.parametrize("change", [-1, 1, -4096], ids=["short", "long", "page"])
@pytest.mark.parametrize("path_of", [frames_path, windows_path])
def test_a_file_that_changed_its_length_since_it_was_listed_is_refused(tmp_path, path_of, change):
    shards = open_shards(noise_set(tmp_path, 0)[0])
    path = path_of(tmp_path, "a")
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"0" * change)
    with pytest.raises(DataError, match=r"\.arrow: (holds \d+ bytes, not the|cannot be read as an Arrow stream)"):
        WindowDataset(shards, ALL)[0]


@pytest.mark.fault("F6")
def test_with_verify_every_flipped_bit_is_refused(tmp_path):
    shards = open_shards(noise_set(tmp_path, 0, windows=2)[0])
    rng = np.random.default_rng(1)
    for path in (frames_path(tmp_path, "a"), windows_path(tmp_path, "a")):
        content = path.read_bytes()
        for at in rng.integers(0, len(content), 120).tolist():
            flipped = bytearray(content)
            flipped[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(DataError, match=r"arrow: (its content is not what was written|cannot be read as an A)"):
                WindowDataset(shards, ALL, verify=True)[0]
        path.write_bytes(content)
    dataset = WindowDataset(shards, ALL, verify=True)
    assert torch.equal(dataset[0]["pictures"], WindowDataset(shards, ALL)[0]["pictures"])


READS = {
    "pictures": lambda dataset: dataset.pictures(1),
    "row": lambda dataset: dataset.row(1),
}


def cut_after_opening(folder, read):
    dataset = WindowDataset(open_shards(folder), ALL, "key")
    dataset[0]
    for path in (frames_path(folder, "a"), tokens_path(folder, "a", "key")):
        os.truncate(path, 4096)
    read(dataset)


def in_a_fork(act, told):
    """Run `act` in a process that may die of it; return how it ended, and write what it raised."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException as error:  # what came out of here would run the rest of the tests once more
            told.write_text(f"{type(error).__name__}: {error}")
            os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.fault("F5")
@pytest.mark.parametrize("read", READS)
def test_a_file_that_is_cut_while_it_is_open_is_an_error_and_no_end(tmp_path, read):
    folder, _ = noise_set(tmp_path / "set", 0)
    rows = [{"input_ids": [1] * 3000, "labels": [1] * 3000, "position_ids": [1] * 12_000} for _ in range(6)]
    commit(tokens_path(folder, "a", "key"), lambda stream: write_stream(pa.Table.from_pylist(rows), stream, 1024))
    told = tmp_path / "told"
    assert in_a_fork(partial(cut_after_opening, folder, READS[read]), told) == 3
    assert re.fullmatch(r"DataError: \S+\.arrow: was cut since it was opened; omni audit .*", told.read_text())


def compare(dataset, windows):
    for index, pictures in enumerate(windows):
        assert torch.equal(dataset.pictures(index), torch.from_numpy(pictures))


def expect_the_reason(dataset):
    with pytest.raises(OmniError, match=r"frames\.arrow: input/output error; the disk failed"):
        dataset.pictures(0)


@needs_strace
@pytest.mark.fault("F4")
def test_what_the_disk_does_not_give_straight_comes_by_way_of_the_map_or_not_at_all(tmp_path):
    folder, windows = noise_set(tmp_path / "set", 0)
    dataset = WindowDataset(open_shards(folder), ALL)
    dataset.row(0)
    for act, calls in (
        (partial(compare, dataset, windows["a"]), "preadv,preadv2"),
        (partial(expect_the_reason, dataset), "preadv,preadv2,pread64,madvise"),
    ):
        assert run_traced(act, f"inject={calls}:error=EIO", calls=calls, log=tmp_path / "log") == 0
        assert "INJECTED" in (tmp_path / "log").read_text()


def test_shards_made_anew_under_a_dataset_change_nothing_for_it(tmp_path):
    folder, windows = noise_set(tmp_path / "set", 0)
    dataset = WindowDataset(open_shards(folder), ALL)
    dataset.row(0)
    noise_set(tmp_path / "set", 1)
    assert torch.equal(dataset.pictures(2), torch.from_numpy(windows["a"][2]))


@pytest.mark.fault("F22")
def test_recordings_that_are_open_hold_no_file_descriptor(tmp_path):
    names = [f"r{number}" for number in range(20)]
    folder, rows = noise_set(tmp_path, 0, names=names, windows=1)
    dataset = WindowDataset(open_shards(folder), ALL)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len([*Path("/proc/self/fd").iterdir()]) + 4
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        read = {dataset.recording_of(index): dataset.pictures(index) for index in range(len(dataset))}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {name: torch.equal(read[name], torch.from_numpy(rows[name][0])) for name in names} == dict.fromkeys(
        names, True
    )


def test_the_bench_reads_windows_that_share_no_byte_from_files_that_were_forgotten(tmp_path):
    folder, _ = noise_set(tmp_path, 0, names=("a", "b"))
    dataset = WindowDataset(open_shards(folder), ALL)
    records = chosen_records(dataset)
    assert len(records) >= 2
    for one, other in combinations(records, 2):
        apart = (p.stop <= q.start or q.stop <= p.start for p in one.pieces for q in other.pieces)
        assert one.path != other.path or all(apart)
    assert all(p.stop < q.start for record in records for p, q in zip(record.pieces, record.pieces[1:], strict=False))
    del dataset
    gc.collect()  # whoever held it in a circle maps its files
    path = frames_path(folder, "a")
    with path.open("rb") as stream:
        path.read_bytes()
        if is_cached(stream.fileno(), 0) is None:
            pytest.skip(f"the file system of {tmp_path} does not say what is in memory")
        assert is_cached(stream.fileno(), 0)
        assert forget({path: stream.fileno()})
        mapped = np.memmap(path)
        assert int(mapped[0]) >= 0
        assert forget({path: stream.fileno()}) is False  # what is mapped stays


def test_what_the_kernel_is_busy_with_is_forgotten_a_little_later(tmp_path, monkeypatch):
    """On a busy machine a page that was just read could not be dropped at once (seen)."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    answers = iter([True, True, False])
    monkeypatch.setattr("omni_cli.stages.bench.loader.is_cached", lambda *_: next(answers))
    with path.open("rb") as stream:
        assert forget({path: stream.fileno()})


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Shards of both recipes."""
    folder, found = tmp_path_factory.mktemp("loader"), {}
    for recipe, write in ((tiny_recipe(), write_synthetic), (tiny_student(), write_drives)):
        write(folder / recipe.name)
        request = EtlRequest(data=folder / recipe.name, out=folder / f"{recipe.name}-shards", workers=0)
        found[recipe.name] = recipe, open_shards(Path(etl(recipe, request, QUIET)["shards"]))
    return found


class Crossing(TorchDispatchMode):
    """Notes the large tensors of the host, and stops when a device holds a float picture."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.host, self.crossed = numbers, set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= self.numbers:
                if tensor.device.type == "meta" and tensor.is_floating_point():
                    raise Crossed
                (self.crossed if tensor.device.type == "meta" else self.host).add(tensor.dtype)
        return result


class Crossed(Exception):
    pass


@pytest.mark.parametrize("name", ["vlm", "distill"])
def test_pictures_cross_to_the_device_as_uint8_and_are_made_numbers_there(cut, name):
    recipe, shards = cut[name]
    dataset = WindowDataset(shards, ALL, ensure_sidecar(shards, recipe, QUIET))
    built = recipe.build(dataset.preprocess)
    with Crossing(dataset.pictures(0).numel()) as seen:
        rows = [dataset[index] for index in range(2)]
        batch = recipe.collate(rows, dataset.preprocess)  # what the Trainer moves
    assert (seen.host, batch["pictures"].dtype) == ({torch.uint8}, torch.uint8)
    floats = [tensor for tensor in batch.values() if tensor.is_floating_point()]
    assert sum(tensor.numel() for tensor in floats) < batch["pictures"].numel() / 20
    there = BuiltModel(built.model.to("meta"), built.tokenizer)
    crossing = Crossing(batch["pictures"].numel())
    with pytest.raises(Crossed), crossing:
        recipe.predict(there, rows, dataset.preprocess)  # of eval and infer
    assert (crossing.host, crossing.crossed) == ({torch.uint8}, {torch.uint8})


def test_the_workers_of_training_come_from_a_forkserver_and_read_the_same_batches(cut, tmp_path):
    """Pain 7: a decoder that was forked may hang."""
    recipe, shards = cut["distill"]
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"workers": 1})})
    dataset = WindowDataset(shards, "train")
    trainer = make_trainer(tmp_path, recipe, recipe.build(dataset.preprocess), dataset, 1)
    loader = trainer.get_train_dataloader().base_dataloader
    assert loader.multiprocessing_context.get_start_method() == "forkserver"
    batch = next(iter(loader))
    pictures = [dataset.pictures(index) for index in range(len(dataset))]
    assert all(any(torch.equal(one, picture) for picture in pictures) for one in batch["pictures"])
