"""Builds sdist and wheel of this checkout, the same bytes each time, in an environment with .ci/builder.txt.

    python .ci/build_release.py OUTDIR

Bytes depend on the tracked files, on SOURCE_DATE_EPOCH (by default the time of the last commit) and on the versions in
builder.txt, and on nothing else: not on the folder, the clock, the umask or the user. The wheel is made of the sdist.
"""

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(outdir: Path) -> None:
    """Writes both files into a folder, and prints their names."""
    outdir.mkdir(parents=True, exist_ok=True)
    os.umask(0o022)  # the wheel tells the modes of its files
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or said_by_git("log", "-1", "--format=%ct"))
    os.environ["SOURCE_DATE_EPOCH"] = str(epoch)
    with tempfile.TemporaryDirectory() as scratch:
        source, built, unpacked = (Path(scratch) / name for name in ("source", "built", "unpacked"))
        copy_tracked_files(source)
        build("--sdist", source, built)
        (sdist,) = built.glob("*.tar.gz")
        repack(sdist, outdir / sdist.name, epoch)
        with tarfile.open(outdir / sdist.name) as tar:
            tar.extractall(unpacked, filter="tar")  # with the modes of the archive, whatever the umask is
        build("--wheel", unpacked / sdist.name.removesuffix(".tar.gz"), built)
        (wheel,) = built.glob("*.whl")
        shutil.copyfile(wheel, outdir / wheel.name)
    print(outdir / sdist.name, outdir / wheel.name, sep="\n")


def copy_tracked_files(folder: Path) -> None:
    """Copies what git tracks, as it lies there, so that no build/ and egg-info come into the checkout."""
    for name in said_by_git("ls-files", "-z").rstrip("\0").split("\0"):
        if (ROOT / name).is_file():  # one that was removed and not committed is not there
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def repack(sdist: Path, output: Path, epoch: int) -> None:
    """Writes a .tar.gz anew: sorted, with one time, one owner, and modes that tell only what is executable."""
    with (
        tarfile.open(sdist) as before,
        output.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=epoch) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as after,
    ):
        for member in sorted(before.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            after.addfile(member, before.extractfile(member) if member.isfile() else None)


def build(kind: str, source: Path, outdir: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", kind, f"--outdir={outdir}", str(source)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        failed = f"{' '.join(command)} failed: is this environment that of .ci/builder.txt?"
        sys.exit(f"{ended.stdout}\n{ended.stderr}\n{failed}")


def said_by_git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
