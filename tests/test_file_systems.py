"""What folders lie on."""

from pathlib import Path

import pytest

from oneshot_ednas.file_systems import file_system, is_remote

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /home rw,relatime shared:2 master:1 - nfs4 server:/home rw
31 30 8:2 / /home/me/lokale\\040Plätze rw - xfs /dev/sdb1 rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/tmp/x", "ext4"),
        ("/home", "nfs4"),
        ("/home/me/runs", "nfs4"),
        ("/homes/me", "ext4"),
        ("/home/me/lokale Plätze/runs", "xfs"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(tmp_path, path, kind):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert file_system(Path(path), mounts) == kind
    assert file_system(Path(path), tmp_path / "none") is None


def test_of_two_file_systems_at_one_place_the_later_is_seen(tmp_path):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"{MOUNTS}32 30 0:41 / /home rw - tmpfs tmpfs rw\n")
    assert file_system(Path("/home/me"), mounts) == "tmpfs"


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "fuse.rclone", "9p"])
def test_others_may_have_these_too(kind):
    assert is_remote(kind)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs", "overlay", "fuseblk", None])
def test_these_are_of_one_machine(kind):
    assert not is_remote(kind)
