"""What a folder lies on: locks, shared memory and fsync differ between machines and networks."""

import os
import re
from pathlib import Path

_REMOTE = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "gcsfuse", "gluster", "gpfs", "lustre", "ncp", "nfs"),
    *("rclone", "s3fs", "smb", "sshfs"),
)
"""What the types of file systems on other machines begin with, but for a `fuse.` before it."""


def file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """Type of the file system that a path lies on, for example `ext4` or `nfs4`.

    Args:
        path: absolute; its links are not followed, and it need not exist.
        mounts: as of proc(5).

    Returns:
        The type; None where the system does not tell.
    """
    if not mounts.exists():
        return None
    best, kind = "", None
    for line in os.fsdecode(mounts.read_bytes()).splitlines():
        left, _, right = line.partition(" - ")
        # Spaces in a path are written as octal numbers.
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), left.split()[4])
        is_above = path == Path(point) or Path(point) in path.parents
        if is_above and len(point) >= len(best):  # of two at one place the later is seen
            best, kind = point, right.split()[0]
    return kind


def is_remote(kind: str | None) -> bool:
    """Whether other machines may have a file system of this type, too; False where it is None."""
    return kind is not None and kind.removeprefix("fuse.").startswith(_REMOTE)
