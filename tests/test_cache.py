"""Packed splits on disk: builds that are killed, builds beside each other, full disks."""

import os
import signal
import time

import numpy as np
import pytest
from test_packed import Frames

from oneshot_ednas.data.cache import load_cached


class SlowFrames(Frames):
    """Frames that take their time."""

    def read(self, index: int) -> dict[str, np.ndarray]:
        time.sleep(0.05)
        return super().read(index)


def build_in_child(cache) -> int:
    child = os.fork()
    if child == 0:
        try:
            load_cached(SlowFrames(count=200), cache_dir=cache, workers=1)
        finally:
            os._exit(1)
    give_up = time.monotonic() + 60
    while not list(cache.glob(".*/*.npy")) and time.monotonic() < give_up:
        time.sleep(0.01)
    return child


def test_what_a_killed_build_leaves_is_removed_by_the_next(tmp_path):
    child = build_in_child(tmp_path)
    (partial,) = tmp_path.iterdir()
    # Not while it goes on: the same split, built by another process.
    load_cached(Frames(count=200), cache_dir=tmp_path, workers=1)
    assert partial.exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (whole,) = [one for one in tmp_path.iterdir() if one != partial]
    (whole / "image.npy").write_bytes(b"cut short")
    with pytest.warns(UserWarning, match="is damaged .*; building it again"):
        load_cached(Frames(count=200), cache_dir=tmp_path, workers=1)
    assert list(tmp_path.iterdir()) == [whole]


def test_room_is_taken_before_the_first_frame_is_read(tmp_path, monkeypatch):
    # As if another process had filled the disk between the look at it and the build.
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"needs 0 MB in .* got \d+ MB; set ONESHOT_EDNAS_CACHE"):
        load_cached(Frames(count=4), cache_dir=tmp_path, workers=1)
    assert list(tmp_path.iterdir()) == []
