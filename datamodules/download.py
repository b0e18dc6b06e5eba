"""Fetch the official archives: resumed, checked, and never half-written.

A transfer goes to `<name>.part` with the server's validator beside it and is renamed once its size and checksum are
right; an archive is unpacked into a temporary folder whose entries are renamed into place. The checksums are the
SHA-256 that TensorFlow Datasets, and for VQA v2 ParlAI, record for these addresses.
"""

import hashlib
import http.client
import json
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from datamodules.unpack import unpack
from lit_clipq.errors import DataError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
ATTEMPTS_WITHOUT_PROGRESS = 5
TRANSIENT = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True)
class Archive:
    """An archive, and how to tell that it has been unpacked."""

    url: str
    """Address, http or https."""
    produces: Mapping[str, int]
    """Path below the data folder -> number of entries a folder has at least; 1 for a file."""
    size_bytes: int | None = None
    """Size of the archive, or None where it is not known: the server's word is then taken."""
    sha256: str | None = None
    """Checksum of the archive, or None where it is not known: a damaged archive is then found on unpacking only."""
    members: tuple[str, ...] = ()
    """Unpack only members whose names begin so; empty for all."""

    @property
    def name(self) -> str:
        """File name of the archive."""
        return self.url.rpartition("/")[2]

    def is_unpacked(self, root: Path) -> bool:
        """Tell whether everything the archive produces is in `root`."""
        return all(_entries(root / path) >= count for path, count in self.produces.items())


COCO_TRAIN_2014 = Archive(
    "http://images.cocodataset.org/zips/train2014.zip",
    {"train2014": 82_783},
    13_510_573_713,
    "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
)
COCO_VAL_2014 = Archive(
    "http://images.cocodataset.org/zips/val2014.zip",
    {"val2014": 40_504},
    6_645_013_297,
    "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
)
COCO_TRAIN_2017 = Archive(
    "http://images.cocodataset.org/zips/train2017.zip",
    {"train2017": 118_287},
    19_336_861_798,
    "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
)
COCO_VAL_2017 = Archive(
    "http://images.cocodataset.org/zips/val2017.zip",
    {"val2017": 5_000},
    815_585_330,
    "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
)
COCO_ANNOTATIONS_2017 = Archive(
    "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
    {"annotations/captions_val2017.json": 1, "annotations/captions_train2017.json": 1},
    252_907_541,
    "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    members=("annotations/captions_",),
)
KARPATHY_SPLITS = Archive(
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
    {"dataset_coco.json": 1},
    36_745_453,
    "4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
    members=("dataset_coco.json",),
)
IMAGENET_V2 = Archive(
    "https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main/imagenetv2-matched-frequency.tar.gz",
    {"imagenetv2-matched-frequency-format-val": 1_000},
    1_264_079_360,
    "f0c37fdf925916b19ea1323cd9a2208cdb6959ba2c32eef2a7fc393835c9ca7c",
)
VQA_TRAIN_QUESTIONS = Archive(
    "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_Questions_Train_mscoco.zip",
    {"v2_OpenEnded_mscoco_train2014_questions.json": 1},
    7_239_401,
    "05a64b6e2582d06d7585f5429674a9a33851878be1bff9f8668cdcf792df611e",
)
VQA_VAL_QUESTIONS = Archive(
    "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_Questions_Val_mscoco.zip",
    {"v2_OpenEnded_mscoco_val2014_questions.json": 1},
    3_494_929,
    "e71f6c5c3e97a51d050f28243e262b28cd0c48d11a6b4632d769d30d3f93222a",
)
VQA_TRAIN_ANNOTATIONS = Archive(
    "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_Annotations_Train_mscoco.zip",
    {"v2_mscoco_train2014_annotations.json": 1},
    21_708_861,
    "fb101bcefe91422c543c2bb6d70af11eb3119d0ff745ae283d09acdf66250853",
)
VQA_VAL_ANNOTATIONS = Archive(
    "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa/v2_Annotations_Val_mscoco.zip",
    {"v2_mscoco_val2014_annotations.json": 1},
    10_518_930,
    "0caae7c8d1dafd852727f5ac046bc1efca9b72026bd6ffa34fc489f3a7b3291e",
)


def fetch(archive: Archive, root: Path, *, timeout_seconds: float = 30.0, lock_seconds: float = -1.0) -> None:
    """Bring the content of an archive into a folder; does nothing where it is there. Safe to call from many processes.

    Args:
        archive: What to fetch.
        root: Folder to unpack into; made if absent.
        timeout_seconds: Longest silence of the server.
        lock_seconds: Longest wait for another process that fetches the same archive; negative waits for ever.

    Raises:
        DataError: Too little disk, no usable answer from the server, a wrong size or checksum, an archive with
            members that would leave the folder.
    """
    if archive.is_unpacked(root):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{archive.name}.lock", timeout=lock_seconds):
            if archive.is_unpacked(root):  # by the process that held the lock before
                return
            file = root / archive.name
            if not (file.is_file() and _sound(file, archive)):
                download(archive, file, timeout_seconds=timeout_seconds)
            unpack(file, root, archive.members)
            if not archive.is_unpacked(root):
                raise DataError(
                    f"{archive.url} was unpacked into {root}, but {dict(archive.produces)} is not all there."
                )
            file.unlink()
    except Timeout as error:
        raise DataError(
            f"Another process is fetching {archive.name} into {root}; wait for it and start again."
        ) from error
    except OSError as error:
        raise DataError(f"{archive.name} cannot be stored in {root} ({error}); choose another --data.root.") from error


def download(archive: Archive, file: Path, *, timeout_seconds: float = 30.0) -> None:
    """Download an archive, resuming what an earlier attempt left behind.

    Args:
        archive: What to download; an address that is not http or https is refused.
        file: Where to; it appears only once complete and checked.
        timeout_seconds: Longest silence of the server.

    Raises:
        DataError: See `fetch`.
    """
    if not archive.url.startswith(("http://", "https://")):
        raise DataError(f"Expected an http or https address, got {archive.url!r}.")
    part = file.with_name(file.name + ".part")
    if archive.size_bytes is not None:
        require_space(file.parent, 2 * archive.size_bytes - _size(part), archive.name)
    failures = 0
    while True:
        before = _size(part)
        try:
            _transfer(archive, part, timeout_seconds)
            break
        except TRANSIENT as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429):
                raise DataError(f"{archive.url} answered {error.code} ({error.reason}); fetch it by hand.") from error
            failures = 0 if _size(part) > before else failures + 1
            if failures == ATTEMPTS_WITHOUT_PROGRESS:
                raise DataError(
                    f"{archive.url} broke off at {_size(part):,} bytes, {failures} times in a row ({error}); start "
                    "again later, the transfer resumes there."
                ) from error
            logger.info("%s: %s; resuming at %d bytes", archive.name, error, _size(part))
            time.sleep(min(0.1 * 2**failures, 5.0))
    _verify(part, archive)
    os.replace(part, file)
    _validator_file(part).unlink(missing_ok=True)


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Check that a folder's disk has room.

    Raises:
        DataError: Less than `needed_bytes` are free.
    """
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise DataError(
            f"{what} needs {needed_bytes / 1e9:.2f} GB in {folder}, but {free / 1e9:.2f} GB are free; "
            "make room, or choose another --data.root."
        )


def _transfer(archive: Archive, part: Path, timeout_seconds: float) -> None:
    """One request: continue `part` where the server agrees that the file is still the same, else begin anew."""
    have, validator = _size(part), _read_validator(part)
    if have and not (validator or archive.sha256):
        have = 0  # nothing would notice that the file has changed since
    if archive.size_bytes is not None and have >= archive.size_bytes:
        return  # complete, or too long: the check of the checksum will tell
    request = urllib.request.Request(archive.url, headers={"User-Agent": "lit-clipq"})  # noqa: S310 - http(s) only
    if have:
        request.add_header("Range", f"bytes={have}-")
        if validator:
            request.add_header("If-Range", validator)
    try:
        response = urllib.request.urlopen(request, timeout=timeout_seconds)  # noqa: S310 - http(s) only
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            _restart_unless_complete(error, part, have)
            return
        raise
    with response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        same_place = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if resumed and not (same_place and validator in (None, _validator(response.headers))):
            part.unlink()
            raise http.client.HTTPException("the server resumed at another place or in another file")
        start = have if resumed else 0
        length = response.headers.get("Content-Length")
        promised = int(length) if length and length.isdigit() else None
        if promised is not None:
            _check_size(archive, part, start, promised)
        _write_validator(part, response.headers)
        logger.info("%s: %s bytes from %d", archive.name, "?" if promised is None else promised, start)
        with open(part, "ab" if resumed else "wb") as file:
            shutil.copyfileobj(response, file, CHUNK_BYTES)
    if promised is not None and _size(part) < start + promised:
        raise http.client.HTTPException(f"{start + promised - _size(part):,} promised bytes did not come")


def _check_size(archive: Archive, part: Path, start: int, promised: int) -> None:
    """Refuse a transfer that cannot end well, before it costs hours."""
    total = start + promised
    if archive.size_bytes not in (None, total):
        raise DataError(
            f"{archive.url} offers {total:,} bytes, expected {archive.size_bytes:,}: the publisher has changed the "
            "archive; unpack it into the data folder by hand."
        )
    require_space(part.parent, promised + total, archive.name)


def _restart_unless_complete(error: urllib.error.HTTPError, part: Path, have: int) -> None:
    """Answer 416 tells the full size, `bytes */N`: with all N bytes here nothing is left to fetch."""
    total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
    if total != str(have):
        part.unlink()
        raise http.client.HTTPException(f"the server has {total or '?'} bytes, {have} are here") from error


def _verify(part: Path, archive: Archive) -> None:
    problem = _problem(part, archive)
    if problem:
        part.unlink()
        _validator_file(part).unlink(missing_ok=True)
        raise DataError(
            f"{archive.url} {problem}; the download was removed. Start again, or if the publisher has changed the "
            "archive, unpack it into the data folder by hand."
        )
    if archive.sha256 is None:
        logger.warning("%s: no checksum is known, %d bytes taken as they are", archive.name, _size(part))


def _sound(file: Path, archive: Archive) -> bool:
    return _problem(file, archive) is None


def _problem(file: Path, archive: Archive) -> str | None:
    """Say how a file differs from the archive it should be, or None."""
    size = _size(file)
    if archive.size_bytes is not None and size != archive.size_bytes:
        return f"has {size:,} bytes, expected {archive.size_bytes:,}"
    if archive.sha256 is None:
        return None
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return None if digest.hexdigest() == archive.sha256 else f"has SHA-256 {digest.hexdigest()}, not {archive.sha256}"


def _validator_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_validator(part: Path) -> str | None:
    try:
        content = json.loads(_validator_file(part).read_text())
    except (OSError, ValueError):
        return None
    validator = content.get("validator") if isinstance(content, dict) else None
    return validator if isinstance(validator, str) else None


def _write_validator(part: Path, headers: http.client.HTTPMessage) -> None:
    _validator_file(part).write_text(json.dumps({"validator": _validator(headers)}))


def _validator(headers: http.client.HTTPMessage) -> str | None:
    """The strong ETag or the date of the file: only these may stand in `If-Range`."""
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _entries(path: Path) -> int:
    if path.is_dir():
        with os.scandir(path) as entries:
            return sum(1 for _ in entries)
    return int(path.is_file())
