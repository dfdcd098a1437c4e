import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from oneshot_ednas.data import cache
from oneshot_ednas.data.manifest import open_manifest
from oneshot_ednas.data.packed import (
    batch_indices,
    default_cache_dir,
    folder_split,
    load_packed,
    split_indices,
    streets_split,
)
from oneshot_ednas.data.targets import TARGET_KINDS, is_in_metres


class Frames:
    """A source that counts how often it is read."""

    name = "toy-train"
    kinds: ClassVar = {"segmentation": "labels", "depth": "depth", "normals": "normals"}
    class_names: ClassVar = {"segmentation": ("a", "b")}

    def __init__(self, count=5, version=1, blind=()):
        self.frames = tuple(f"f{i}" for i in range(count))
        self.version = version
        self.blind = blind
        self.reads = 0

    def identity(self):
        return {"version": self.version, "frames": len(self.frames)}

    def read(self, index):
        self.reads += 1
        depth = np.full((2, 3), index + 1.5, dtype=np.float32)
        if index in self.blind:
            depth[:] = 0
        normals = np.zeros((2, 3, 3), dtype=np.float16)
        normals[..., 2] = -1
        normals[..., 0, 0] = index / 16
        return {
            "image": np.full((2, 3, 3), (index, 255, 0), dtype=np.uint8),
            "segmentation": np.full((2, 3), 255 if index == 0 else index, dtype=np.uint8),
            "depth": depth,
            "normals": normals,
        }


class MissingFrame(Frames):
    def read(self, index):
        if self.frames[index] == "f20":
            raise ValueError("frame f20: no file")
        return super().read(index)


def write_folder(root, frames=6):
    for folder in ("rgb", "depth"):
        (root / folder).mkdir(parents=True)
    for i in range(frames):
        Image.new("RGB", (6, 4), (i, 2 * i, 3 * i)).save(root / f"rgb/{i}.png")
        depth = np.full((4, 6), 1000 * (i + 1), dtype=np.uint16)
        Image.fromarray(depth).save(root / f"depth/{i}.png")
    (root / "train.txt").write_text("".join(f"{i}\n" for i in range(frames)))
    manifest = {
        "name": "folder",
        "image": {"folder": "rgb", "suffix": ".png"},
        "splits": {"train": "train.txt"},
        "targets": {
            "depth": {"kind": "depth", "folder": "depth", "suffix": ".png", "scale": 0.001}
        },
    }
    (root / "dataset.yaml").write_text(yaml.safe_dump(manifest))


def test_a_split_holds_every_frame_in_order(tmp_path):
    packed = load_packed(Frames(), cache_dir=tmp_path)
    assert len(packed) == 5
    assert (packed.height, packed.width) == (2, 3)
    assert packed.sources == ("f0", "f1", "f2", "f3", "f4")
    assert packed.class_names == {"segmentation": ("a", "b")}
    assert packed.kinds == Frames.kinds
    for i in range(5):
        expected, frame = Frames().read(i), packed.frame(i)
        assert frame.keys() == expected.keys()
        assert all((frame[name] == expected[name]).all() for name in frame)
        assert all(frame[name].dtype == expected[name].dtype for name in frame)
    assert all(isinstance(array, np.memmap) for array in packed.arrays.values())


def test_a_cache_hit_reads_nothing_and_a_changed_identity_builds_again(tmp_path):
    first, second, changed = Frames(), Frames(), Frames(version=2)
    load_packed(first, cache_dir=tmp_path, workers=1)
    load_packed(second, cache_dir=tmp_path, workers=1)
    load_packed(changed, cache_dir=tmp_path, workers=1)
    # One read more than frames: the first tells names, shapes and types.
    assert (first.reads, second.reads, changed.reads) == (6, 0, 6)
    assert len(list(tmp_path.iterdir())) == 2
    assert all(path.name.startswith("toy-train-") for path in tmp_path.iterdir())


def damage_truncate(folder):
    data = (folder / "depth.npy").read_bytes()
    (folder / "depth.npy").write_bytes(data[:-4])


def damage_empty(folder):
    (folder / "depth.npy").write_bytes(b"")


def damage_remove(folder):
    (folder / "image.npy").unlink()


def damage_shape(folder):
    np.save(folder / "depth.npy", np.zeros((5, 2, 4), dtype=np.float32))


def damage_meta(folder):
    (folder / "meta.json").write_text('{"arrays": ')


def damage_meta_kind(folder):
    (folder / "meta.json").write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_empty,
        damage_remove,
        damage_shape,
        damage_meta,
        damage_meta_kind,
    ],
)
def test_a_damaged_cache_is_built_again(tmp_path, damage):
    load_packed(Frames(), cache_dir=tmp_path, workers=1)
    (folder,) = tmp_path.iterdir()
    damage(folder)
    source = Frames()
    with pytest.warns(UserWarning, match=r"toy-train-\w{16} is damaged \(.+\); building it again"):
        packed = load_packed(source, cache_dir=tmp_path, workers=1)
    assert source.reads == 6
    assert packed.frame(3)["depth"].max() == 4.5
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    load_packed(Frames(), cache_dir=tmp_path)


def test_a_build_that_fails_leaves_nothing_behind(tmp_path):
    class Failing(Frames):
        def read(self, index):
            if index == 4:
                raise ValueError("frame f4: no file")
            return super().read(index)

    with pytest.raises(ValueError, match="frame f4: no file"):
        load_packed(Failing(), cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_builders_at_once_agree(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        splits = list(
            pool.map(lambda _: load_packed(Frames(), cache_dir=tmp_path, workers=1), range(4))
        )
    assert len(list(tmp_path.iterdir())) == 1
    assert all((split.arrays["depth"] == splits[0].arrays["depth"]).all() for split in splits)


def test_frames_unlike_the_first_are_refused(tmp_path):
    class Uneven(Frames):
        def read(self, index):
            frame = super().read(index)
            if index == 3:
                frame["depth"] = frame["depth"][:1]
            if index == 2 and self.version == 2:
                del frame["normals"]
            return frame

    with pytest.raises(ValueError, match=r"depth of frame 3 is float32 \(1, 3\), expected float32"):
        load_packed(Uneven(), cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"frame 2 has \['depth', 'image', 'segm.*the first has"):
        load_packed(Uneven(version=2), cache_dir=tmp_path)


def test_a_cache_folder_that_cannot_be_used_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write the cache folder .*; set ONESHOT_EDNAS_C"):
        load_packed(Frames(), cache_dir=tmp_path / "file")
    usage = cache.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"toy-train needs 0 MB in .*, got 0 MB; set ONESHOT"):
        load_packed(Frames(), cache_dir=tmp_path)


def test_frames_without_depth_are_kept_counted_and_named_in_a_warning(tmp_path):
    expected = "2 of 5 frames of toy-train have no valid depth; they are kept"
    for _ in range(2):  # built, and from the cache
        with pytest.warns(UserWarning, match=expected):
            packed = load_packed(Frames(blind=(1, 4)), cache_dir=tmp_path)
    assert len(packed) == 5
    assert packed.num_invalid_depth_frames == 2
    assert packed.subset([0, 1]).num_invalid_depth_frames == 1


class Deep(Frames):
    """Frames of a given depth, of which one pixel has another."""

    def __init__(self, metres, one=None, kind="depth"):
        super().__init__(count=3, version=[metres, one, kind])
        self.metres, self.one = metres, one
        self.kinds = {**Frames.kinds, "depth": kind}

    def read(self, index):
        frame = super().read(index)
        frame["depth"][:] = self.metres
        frame["depth"][0, 0] = self.metres if self.one is None else self.one
        return frame


@pytest.mark.parametrize(
    ("metres", "one", "message"),
    [
        (2500, None, r"depth of toy-train has a median of 2500 m and reaches 2500 m; expected met"),
        (120, None, "has a median of 120 m and reaches 120 m; expected metres: check its scale"),
        (20, 65535, "has a median of 20 m and reaches 6.554e.04 m; expected metres: check its sc"),
        (0.0025, None, "has a median of 0.0025 m and reaches 0.0025 m; expected metres"),
    ],
)
def test_a_depth_that_is_hardly_in_metres_is_named_in_one_warning(tmp_path, metres, one, message):
    for _ in range(2):  # built, and from the cache
        with pytest.warns(UserWarning, match=message) as caught:
            load_packed(Deep(metres, one), cache_dir=tmp_path)
        assert len(caught) == 1
        assert "\n" not in str(caught[0].message)


@given(st.floats(0.05, 100), st.floats(1, 10))
def test_the_limits_of_metres_are_those_of_the_median_and_the_largest(median, factor):
    assert is_in_metres(median, median * factor)
    assert not is_in_metres(median, 1000.1 * factor)
    assert not is_in_metres(100.1 * factor, 100.1 * factor)
    assert not is_in_metres(0.0499 / factor, median)


def test_depths_of_rooms_and_streets_and_other_quantities_raise_no_warning(tmp_path):
    for metres, one in [(0.1, 0.02), (2.5, 0), (20, 80), (90, 655)]:
        load_packed(Deep(metres, one), cache_dir=tmp_path)
    load_packed(Deep(2500, kind="disparity"), cache_dir=tmp_path)


def test_targets_of_every_kind_have_their_tensors(tmp_path):
    class Kinds(Frames):
        kinds: ClassVar = {name: name for name in TARGET_KINDS}

        def read(self, index):
            frame = {"image": np.zeros((2, 3, 3), np.uint8)}
            for name, kind in TARGET_KINDS.items():
                shape = (2, 3) if kind.channels == 1 else (2, 3, kind.channels)
                frame[name] = np.full(shape, 1, kind.dtype)
                frame[name][0, 0] = kind.invalid
            return frame

    batch = load_packed(Kinds(), cache_dir=tmp_path).batch([0, 2, 3, 1])
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items() if name != "image"} == {
        "labels": ((4, 2, 3), torch.int64),
        "edges": ((4, 2, 3), torch.int64),
        "depth": ((4, 1, 2, 3), torch.float32),
        "disparity": ((4, 1, 2, 3), torch.float32),
        "normals": ((4, 3, 2, 3), torch.float32),
        "values": ((4, 1, 2, 3), torch.float32),
    }
    assert [batch[name][0, ..., 0, 0].tolist() for name in ("labels", "edges")] == [255, 255]
    assert [batch[name][0, ..., 0, 0].tolist() for name in ("depth", "disparity")] == [[0], [0]]
    assert batch["normals"][0, :, 0, 0].tolist() == [0, 0, 0]
    assert bool(batch["values"][:, 0, 0, 0].isnan().all())
    assert batch["values"].nansum() == 4 * 5


def test_a_batch_follows_the_training_contract(tmp_path):
    packed = load_packed(Frames(), cache_dir=tmp_path)
    batch = packed.batch([3, 0])
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "image": ((2, 3, 2, 3), torch.float32),
        "segmentation": ((2, 2, 3), torch.int64),
        "depth": ((2, 1, 2, 3), torch.float32),
        "normals": ((2, 3, 2, 3), torch.float32),
    }
    torch.testing.assert_close(batch["image"][0, :, 0, 0], torch.tensor([3 / 127.5 - 1, 1, -1]))
    assert batch["segmentation"][:, 0, 0].tolist() == [3, 255]
    assert batch["depth"][:, 0, 1, 2].tolist() == [4.5, 1.5]
    assert batch["normals"][0, :, 1, 0].tolist() == [3 / 16, 0, -1]
    assert batch["normals"][0, :, 1, 1].tolist() == [0, 0, -1]
    assert all(tensor.is_contiguous() for tensor in batch.values())
    batch["depth"].zero_()  # a copy: the stored frames stay as they are
    assert packed.batch([3])["depth"].min() == 4.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_batch_on_the_gpu_equals_the_one_on_the_cpu(tmp_path):
    packed = load_packed(Frames(), cache_dir=tmp_path)
    here, there = packed.batch([1, 2]), packed.batch([1, 2], "cuda")
    assert all(there[name].is_cuda for name in there)
    assert all(torch.equal(there[name].cpu(), here[name]) for name in here)


def test_a_subset_shares_the_arrays_and_may_be_cut_again(tmp_path):
    packed = load_packed(Frames(), cache_dir=tmp_path)
    part = packed.subset([4, 2, 1]).subset(np.array([2, 0]))
    assert part.sources == ("f1", "f4")
    assert part.arrays is packed.arrays
    assert part.batch([0, 1])["depth"][:, 0, 0, 0].tolist() == [2.5, 5.5]
    with pytest.raises(ValueError, match=r"toy-train has frames 0\.\.4, got 5"):
        packed.subset([0, 5])
    with pytest.raises(ValueError, match=r"toy-train has frames 0\.\.4, got -1"):
        packed.subset([-1])
    with pytest.raises(ValueError, match="expected at least one frame for a part of toy-train"):
        packed.subset([])


def test_worker_processes_give_the_same_arrays_and_report_progress(tmp_path):
    seen = []
    source = Frames(count=40, blind=(7, 33))
    expected = "2 of 40 frames of toy-train have no valid depth"
    with pytest.warns(UserWarning, match=expected):
        many = load_packed(
            source, cache_dir=tmp_path / "a", workers=2, progress=lambda *x: seen.append(x)
        )
    with pytest.warns(UserWarning, match=expected):
        one = load_packed(Frames(40, blind=(7, 33)), cache_dir=tmp_path / "b", workers=1)
    assert source.reads == 1  # the others were read in the workers
    assert sorted(done for done, _ in seen) == [done for done, _ in seen]
    assert seen[-1] == (40, 40)
    assert all((many.arrays[name] == one.arrays[name]).all() for name in one.arrays)


def test_an_error_in_a_worker_process_is_raised_here(tmp_path):
    with pytest.raises(ValueError, match="frame f20: no file"):
        load_packed(MissingFrame(count=40), cache_dir=tmp_path, workers=2)
    assert list(tmp_path.iterdir()) == []


def test_a_data_folder_is_packed_and_packed_again_when_a_file_changes(tmp_path):
    write_folder(tmp_path / "data")
    options = {"height": 4, "width": 6, "cache_dir": tmp_path / "cache"}
    packed = folder_split(open_manifest(tmp_path / "data"), "train", **options)
    assert packed.name == "folder-train"
    assert set(packed.arrays) == {"image", "depth"}
    assert packed.class_names == {}
    assert packed.kinds == {"depth": "depth"}
    assert packed.arrays["depth"][:, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert packed.arrays["image"][2, 0, 0].tolist() == [2, 4, 6]
    folder_split(open_manifest(tmp_path / "data"), "train", **options)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    Image.fromarray(np.full((4, 6), 9000, np.uint16)).save(tmp_path / "data/depth/0.png")
    packed = folder_split(open_manifest(tmp_path / "data"), "train", **options)
    assert packed.arrays["depth"][0, 0, 0] == 9
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_changed_split_is_packed_again_even_if_all_frames_lie_in_one_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    root = tmp_path / "data"
    root.mkdir()
    with h5py.File(root / "all.mat", "w") as file:
        file["images"] = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((3, 6, 4), int)
    manifest = {
        "name": "stack",
        "image": {"folder": ".", "suffix": "all.mat", "stack": "images"},
        "splits": {"train": "train.txt"},
    }
    (root / "dataset.yaml").write_text(yaml.safe_dump(manifest))
    for frames in ([0, 1], [2, 3]):
        (root / "train.txt").write_text("".join(f"{i}\n" for i in frames))
        packed = folder_split(
            open_manifest(root), "train", height=4, width=6, cache_dir=tmp_path / "cache"
        )
        assert packed.arrays["image"][:, 0, 0, 0].tolist() == frames


def test_a_target_that_is_not_packed_may_change(tmp_path):
    write_folder(tmp_path / "data")
    options = {"height": 4, "width": 6, "cache_dir": tmp_path / "cache", "targets": ()}
    for scale in ("0.001", "0.002"):
        manifest = (tmp_path / "data/dataset.yaml").read_text().replace("0.001", scale)
        (tmp_path / "data/dataset.yaml").write_text(manifest)
        assert folder_split(open_manifest(tmp_path / "data"), "train", **options).kinds == {}
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_faults_of_a_data_folder_show_before_anything_is_built(tmp_path):
    write_folder(tmp_path / "data")
    options = {"height": 4, "width": 6, "cache_dir": tmp_path / "cache"}
    (tmp_path / "data/depth/5.png").unlink()
    with pytest.raises(ValueError, match=r"frame 5: no file depth/5\.png"):
        folder_split(open_manifest(tmp_path / "data"), "train", **options)
    with pytest.raises(ValueError, match="folder has no split val; known: train"):
        folder_split(open_manifest(tmp_path / "data"), "val", **options)
    with pytest.raises(ValueError, match="folder has no target normals"):
        folder_split(open_manifest(tmp_path / "data"), "train", targets=["normals"], **options)
    with pytest.raises(ValueError, match="folder has no segmentation, so no label map m"):
        folder_split(open_manifest(tmp_path / "data"), "train", label_map="m", **options)
    with pytest.raises(ValueError, match="a height and a width of at least 1, got 0 and 6"):
        folder_split(open_manifest(tmp_path / "data"), "train", **{**options, "height": 0})
    assert not (tmp_path / "cache").exists()


def test_the_embedded_data_set_is_packed(tmp_path):
    packed = streets_split("train", 2, height=24, width=48, cache_dir=tmp_path)
    assert len(packed) == 2
    assert packed.name == "streets-train"
    kinds = {name: (a.dtype.name, a.shape[1:]) for name, a in packed.arrays.items()}
    assert kinds == {
        "image": ("uint8", (24, 48, 3)),
        "segmentation": ("uint8", (24, 48)),
        "depth": ("float32", (24, 48)),
        "normals": ("float16", (24, 48, 3)),
    }
    assert len(packed.class_names["segmentation"]) > 2
    assert packed.kinds == {"segmentation": "labels", "depth": "depth", "normals": "normals"}
    with pytest.raises(ValueError, match="expected at least one frame of val, got 0"):
        streets_split("val", 0, height=24, width=48, cache_dir=tmp_path)


def test_the_cache_folder_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("ONESHOT_EDNAS_CACHE", str(tmp_path / "chosen"))
    assert default_cache_dir() == tmp_path / "chosen"
    load_packed(Frames(), workers=1)
    (folder,) = (tmp_path / "chosen").iterdir()
    assert json.loads((folder / "meta.json").read_text())["identity"]["name"] == "toy-train"
    monkeypatch.delenv("ONESHOT_EDNAS_CACHE")
    assert "oneshot_ednas" in str(default_cache_dir())


def test_opening_whole_frames_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_packed(Frames(), cache_dir=tmp_path)
        load_packed(Frames(), cache_dir=tmp_path)


@given(num=st.integers(1, 60), data=st.data(), seed=st.integers(0, 2**31), epoch=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_each_epoch_is_a_permutation(num, data, seed, epoch):
    batch = data.draw(st.integers(1, num))
    steps = num // batch
    seen = [
        batch_indices(num, batch, step, seed) for step in range(epoch * steps, (epoch + 1) * steps)
    ]
    assert all(len(part) == batch for part in seen)
    flat = np.concatenate(seen)
    assert len(set(flat.tolist())) == steps * batch
    assert flat.min() >= 0
    assert flat.max() < num


def test_the_order_depends_on_seed_and_epoch_only():
    order = [batch_indices(100, 100, step, seed).tolist() for step in (0, 1) for seed in (0, 1)]
    assert len({tuple(part) for part in order}) == 4
    assert order[0] == batch_indices(100, 100, 0, 0).tolist()


@given(num=st.integers(10, 200), share=st.floats(0.15, 0.7), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_parts_are_disjoint_and_hold_every_sample(num, share, seed):
    rest = 1 - share
    fractions = {"weights": share, "alpha": rest / 2, "val": rest - rest / 2}
    parts = split_indices(num, fractions, seed)
    assert list(parts) == list(fractions)
    assert sorted(parts["weights"] + parts["alpha"] + parts["val"]) == list(range(num))
    assert all(abs(len(parts[name]) - fractions[name] * num) <= 1 for name in parts)
    assert parts == split_indices(num, fractions, seed)


def test_parts_differ_between_seeds():
    fractions = {"a": 0.5, "b": 0.5}
    assert split_indices(50, fractions, 0) != split_indices(50, fractions, 1)


def test_orders_and_parts_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="at least one batch of 9 samples, got a split of 8"):
        batch_indices(8, 9, 0, 0)
    with pytest.raises(ValueError, match=r"a batch size of at least 1, .* got 0, 0 and 0"):
        batch_indices(8, 0, 0, 0)
    with pytest.raises(ValueError, match=r"shares that sum to 1, got \{'a': 0.5, 'b': 0.4\}"):
        split_indices(8, {"a": 0.5, "b": 0.4}, 0)
    with pytest.raises(ValueError, match="expected positive shares, got"):
        split_indices(8, {"a": 1.0, "b": 0.0}, 0)
    with pytest.raises(ValueError, match=r"part b with a share of 0.01 of 8 samples is empty"):
        split_indices(8, {"a": 0.99, "b": 0.01}, 0)
    with pytest.raises(ValueError, match="a seed of at least 0, got -1"):
        split_indices(8, {"a": 1.0}, -1)
