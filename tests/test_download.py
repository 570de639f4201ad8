"""Fetching VOC and COCO: whole or not at all, from archives on this disk."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from torchvision.datasets.utils import check_integrity

from detection.config.schema import Data
from detection.data import download as module
from detection.data.download import PARTS, download, fetch

URL = "http://images.example/zips/things.zip"


def make_archive(path: Path, files: dict[str, str]) -> str:
    """Write a zip or tar archive of these files, and return its MD5."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    else:
        with tarfile.open(path, "w") as archive:
            for name, text in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(text)
                archive.addfile(entry, io.BytesIO(text.encode()))
    return hashlib.md5(path.read_bytes()).hexdigest()


def files_below(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder whose files `download_url` fetches by name; it returns those that were, and keeps a right one."""
    folder, fetched = tmp_path / "server", []
    folder.mkdir()

    def copy(url: str, root: str, filename: str, md5: str) -> None:
        path = Path(root) / filename
        if not check_integrity(str(path), md5):
            fetched.append(filename)
            shutil.copy(folder / filename, path)
            if not check_integrity(str(path), md5):
                raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(module, "download_url", copy)
    return folder, fetched


@pytest.fixture
def fetched(monkeypatch):
    """What would have been fetched: address and folder."""
    calls = []
    monkeypatch.setattr(module, "fetch", lambda url, md5, folder: calls.append((url.rpartition("/")[2], folder)))
    return calls


def test_an_archive_is_unpacked_and_leaves_nothing_behind(server, tmp_path):
    md5 = make_archive(server[0] / "things.zip", {"a/one.txt": "1", "a/b/two.txt": "2"})
    fetch(URL, md5, tmp_path / "data")
    assert files_below(tmp_path / "data") == {"a/one.txt": "1", "a/b/two.txt": "2"}
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["a"]


@pytest.mark.attempt("damaged files")
def test_half_an_archive_is_fetched_again_and_a_whole_one_is_not(server, tmp_path):
    folder, names = server
    md5 = make_archive(folder / "things.zip", {"a/one.txt": "1" * 1000})
    parts = tmp_path / "data" / PARTS
    parts.mkdir(parents=True)
    (parts / "things.zip").write_bytes((folder / "things.zip").read_bytes()[:100])
    (parts / "unpacked" / "a").mkdir(parents=True)
    (parts / "unpacked" / "a" / "rest.txt").write_text("of a call that was interrupted")
    fetch(URL, md5, tmp_path / "data")
    assert names == ["things.zip"] and files_below(tmp_path / "data") == {"a/one.txt": "1" * 1000}
    parts.mkdir()
    shutil.copy(folder / "things.zip", parts)
    shutil.rmtree(tmp_path / "data" / "a")
    fetch(URL, md5, tmp_path / "data")
    assert names == ["things.zip"] and files_below(tmp_path / "data") == {"a/one.txt": "1" * 1000}


@pytest.mark.attempt("damaged files")
def test_a_wrong_checksum_unpacks_nothing(server, tmp_path):
    make_archive(server[0] / "things.zip", {"a/one.txt": "1"})
    with pytest.raises(RuntimeError, match="corrupted"):
        fetch(URL, "0" * 32, tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [PARTS]


@pytest.mark.attempt("damaged files")
def test_an_interrupted_unpacking_shows_nothing(server, tmp_path, monkeypatch):
    md5 = make_archive(server[0] / "things.zip", {"a/one.txt": "1", "a/two.txt": "2"})
    unpack = module.extract_archive

    def interrupt(archive: str, folder: str) -> None:
        unpack(archive, folder)
        (Path(folder) / "a" / "two.txt").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "extract_archive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(URL, md5, tmp_path / "data")
    assert not (tmp_path / "data" / "a").exists()
    monkeypatch.setattr(module, "extract_archive", unpack)
    fetch(URL, md5, tmp_path / "data")
    assert files_below(tmp_path / "data") == {"a/one.txt": "1", "a/two.txt": "2"} and server[1] == ["things.zip"]


def test_archives_are_merged_and_lists_come_last(server, tmp_path, monkeypatch):
    year = "VOCdevkit/VOC2007"
    content = {
        f"{year}/ImageSets/Main/test.txt": "2\n",
        f"{year}/JPEGImages/2.jpg": "",
        f"{year}/Annotations/2.xml": "",
    }
    md5 = make_archive(server[0] / "test.tar", content)
    (tmp_path / year / "JPEGImages").mkdir(parents=True)
    (tmp_path / year / "JPEGImages" / "1.jpg").write_text("of another archive")
    moved, move = [], module.os.replace
    monkeypatch.setattr(module.os, "replace", lambda source, target: (moved.append(target.name), move(source, target)))
    fetch("http://voc.example/test.tar", md5, tmp_path)
    assert moved == ["2.xml", "2.jpg", "test.txt"]
    assert set(files_below(tmp_path / year)) == {"ImageSets/Main/test.txt", *(f"JPEGImages/{i}.jpg" for i in "12")} | {
        "Annotations/2.xml"
    }


def test_voc_splits(fetched, tmp_path):
    splits = ["VOC2007/trainval", "VOC2012/trainval"]
    root = tmp_path / "VOCdevkit"
    data = Data(format="voc", root=root, train=splits, val=["VOC2007/test"])
    for place in ("ImageSets/Main/trainval.txt", "JPEGImages/one.jpg", "Annotations/one.xml"):
        (root / "VOC2012" / place).parent.mkdir(parents=True)
        (root / "VOC2012" / place).write_text("one\n")
    download(data)
    archives = ["VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"]
    assert fetched == [(name, tmp_path) for name in archives]
    (root / "VOC2012/JPEGImages/one.jpg").unlink()  # half unpacked: listed, but not there
    fetched.clear()
    download(data)
    assert [name for name, _ in fetched] == [archives[0], "VOCtrainval_11-May-2012.tar", archives[1]]
    for wrong, message in (
        ({"root": tmp_path / "voc"}, "end data.root in it"),
        ({"val": ["VOC2012/test"]}, "VOC2012/test: cannot be downloaded"),
        ({"val": ["VOC2011/val"]}, "VOC2011/val: cannot be downloaded"),
        ({"val": ["BCCD/test"]}, "BCCD/test: cannot be downloaded"),
    ):
        with pytest.raises(ValueError, match=message):
            download(data.model_copy(update=wrong))


def test_coco_splits(fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COCO_IMAGES", {"train2017": 3, "val2017": 2})
    annotations = {name: [f"annotations/instances_{name}2017.json"] for name in ("train", "val")}
    data = Data(root=tmp_path, train_images="train2017", val_images="val2017", **annotations)
    for split in ("train2017", "val2017"):  # of train a part, as an interrupted unpacking leaves it
        (tmp_path / split).mkdir()
        for index in range(2):
            (tmp_path / split / f"{index}.jpg").touch()
    download(data)
    assert [name for name, _ in fetched] == ["train2017.zip", *["annotations_trainval2017.zip"] * 2]
    assert {folder for _, folder in fetched} == {tmp_path}
    fetched.clear()
    download(data.model_copy(update={"val": [], "val_images": "", "val_fraction": 0.1}))
    assert [name for name, _ in fetched] == ["train2017.zip", "annotations_trainval2017.zip"]
    with pytest.raises(ValueError, match=r"my\.json with images in 'train2017': cannot be downloaded"):
        download(data.model_copy(update={"train": ["my.json"]}))


@pytest.mark.parametrize("error", [RuntimeError("File not found or corrupted."), zipfile.BadZipFile("no zip"), OSError])
@pytest.mark.attempt("damaged files")
def test_a_failure_is_said_in_one_sentence(monkeypatch, tmp_path, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(module, "fetch", fail)
    data = Data(format="voc", root=tmp_path / "VOCdevkit", train=["VOC2007/train"], val=["VOC2007/val"])
    with pytest.raises(OSError, match=r"VOCdevkit: the download failed \(.*\); fetch the archives by hand"):
        download(data)


def test_drawn_scenes_need_no_download(fetched):
    download(Data(format="synthetic"))
    assert fetched == []
