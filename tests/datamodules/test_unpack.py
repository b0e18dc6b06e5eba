import io
import os
import tarfile
import zipfile
from collections import namedtuple

import pytest

from datamodules.unpack import unpack
from lit_clipq.errors import DataError


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_zip(path, files, modes=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (modes or {}).get(name, 0o100644) << 16
            archive.writestr(info, content)
    return path


def make_tar(path, members, compression="gz"):
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, kind, content in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
            else:
                info.linkname = content.decode()
            archive.addfile(info, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
    return path


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


FILES = {"val/a.jpg": b"a" * 1000, "val/deep/b.jpg": b"b", "top.json": b"{}", "val/empty": b""}


@pytest.mark.parametrize("compression", ["zip", "gz", ""])
def test_archives_are_unpacked(tmp_path, root, compression):
    file = tmp_path / "x.archive"
    if compression == "zip":
        make_zip(file, FILES)
    else:
        make_tar(file, [(name, tarfile.REGTYPE, content) for name, content in FILES.items()], compression)
    unpack(file, root)
    assert tree(root) == FILES


def test_prefixes_choose_and_folders_are_merged(tmp_path, root):
    (root / "val").mkdir()
    (root / "val/mine.jpg").write_bytes(b"mine")
    (root / "val/a.jpg").write_bytes(b"old")
    unpack(make_zip(tmp_path / "x.zip", FILES), root, ("val/",))
    assert tree(root) == {**{k: v for k, v in FILES.items() if k != "top.json"}, "val/mine.jpg": b"mine"}


@pytest.mark.parametrize("name", ["../evil", "val/../../evil", "/evil", "C:\\evil", "..\\evil"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_members_that_leave_the_folder_are_refused_before_anything_is_written(tmp_path, root, name, kind):
    if kind == "zip":
        file = make_zip(tmp_path / "x.zip", {"good": b"1", name: b"2"})
    else:
        file = make_tar(tmp_path / "x.tar.gz", [("good", tarfile.REGTYPE, b"1"), (name, tarfile.REGTYPE, b"2")])
    with pytest.raises(DataError, match="would leave the folder"):
        unpack(file, root)
    assert sorted(os.listdir(tmp_path)) == sorted([file.name, "root"])
    assert os.listdir(root) == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, root, kind):
    file = make_tar(tmp_path / "x.tar.gz", [("good", tarfile.REGTYPE, b"1"), ("bad", kind, b"/etc/passwd")])
    with pytest.raises(DataError, match="'bad', a link or device"):
        unpack(file, root)
    assert os.listdir(root) == []


def test_links_in_a_zip_are_refused(tmp_path, root):
    file = make_zip(tmp_path / "x.zip", {"good": b"1", "bad": b"/etc/passwd"}, {"bad": 0o120777})
    with pytest.raises(DataError, match="'bad', a link or device"):
        unpack(file, root)
    assert os.listdir(root) == []


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_archives_leave_nothing_behind(tmp_path, root, kind, keep):
    files = {f"val/{i}": os.urandom(3000) for i in range(20)}
    if kind == "zip":
        file = make_zip(tmp_path / "x.zip", files)
    else:
        file = make_tar(tmp_path / "x.tar.gz", [(name, tarfile.REGTYPE, content) for name, content in files.items()])
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(file, root)
    assert os.listdir(root) == []


def test_a_damaged_member_leaves_nothing_behind(tmp_path, root):
    file = make_zip(tmp_path / "x.zip", {"a": b"1" * 10, "b": os.urandom(5000)})
    content = bytearray(file.read_bytes())
    content[2000] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(file, root)
    assert os.listdir(root) == []


def test_too_little_disk_is_said_before_anything_is_written(tmp_path, root, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 5, 999))
    with pytest.raises(DataError, match="free"):
        unpack(make_zip(tmp_path / "x.zip", FILES), root)
    assert os.listdir(root) == []


def test_the_rest_of_a_killed_attempt_is_cleared(tmp_path, root):
    (root / ".unpack-x.zip").mkdir()
    (root / ".unpack-x.zip" / "half").write_bytes(b"h")
    unpack(make_zip(tmp_path / "x.zip", FILES), root)
    assert tree(root) == FILES
