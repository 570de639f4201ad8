"""Image files of cameras, microscopes and tools: the right pixels, or a sentence that says why there are none."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from fake_data import HEIGHT, WIDTH, coco_content, sentence, voc_object, write_coco, write_image, write_voc
from helpers import run_tool
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from detection.config.schema import ImageData
from detection.data import DetectionDataset, load_image, read_coco, read_voc
from detection.data.image_files import EXTENSIONS, Look, examine_image
from detection.data.images import read_folder, read_image_split
from detection.data.pictures import read_image

pytestmark = pytest.mark.attempt("mutated images")
UNKNOWN = "the file does not say which are black and white; convert it to 8 bits, or declare the range"


def write_tiff(path: Path, pixels: np.ndarray, **tags: float) -> Path:
    """A TIFF file; "low" and "high" declare its range."""
    directory = ImageFileDirectory_v2()
    for name, tag in (("low", 340), ("high", 341)):
        if name in tags:
            directory[tag] = tags[name]
    Image.fromarray(pixels).save(path, tiffinfo=directory)
    return path


def grey_of(path: Path) -> list[int]:
    """The first row of an image whose channels are equal, as training and as a prediction read it."""
    pixels = load_image(path)
    assert pixels.shape[2] == 3 and (pixels == pixels[:, :, :1]).all() and pixels.dtype == np.uint8
    assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), pixels)
    assert examine_image(path, pixels.shape[1], pixels.shape[0]).problem is None
    return pixels[0, :, 0].tolist()


@pytest.mark.parametrize("kind", [">f4", "f8", "longdouble", "f2"])
def test_arrays_of_any_kind_of_floats(kind):
    array = np.linspace(0, 1, 24).astype(kind).reshape(2, 4, 3)
    picture = read_image(array)
    assert str(picture.dtype) == "torch.float32"
    assert np.array_equal(picture.permute(1, 2, 0).numpy(), array.astype(np.float32))


def refused(path: Path) -> str:
    """The reason, the same for training, prediction and the check of a data set."""
    with pytest.raises(ValueError, match="does not decode") as caught:
        load_image(path)
    reason = examine_image(path).problem
    assert str(caught.value).startswith(f"{path}: the image does not decode: {reason}")
    with pytest.raises(ValueError, match="does not decode") as caught:
        read_image(path)
    assert str(caught.value) == f"{path}: the image does not decode: {reason}"
    return reason


# More than 8 bits


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.uint16])
def test_a_declared_range_is_black_to_white(tmp_path, kind):
    assert grey_of(write_tiff(tmp_path / "a.tif", np.array([[0, 500, 1000, 2000]], kind), low=0, high=1000)) == [
        0,
        128,
        255,
        255,
    ]
    assert grey_of(write_tiff(tmp_path / "b.tif", np.array([[100, 200, 300, 50]], kind), low=100, high=300)) == [
        0,
        128,
        255,
        0,
    ]


@pytest.mark.parametrize("low_high", [(5, 5), (0, float("inf")), (0, float("nan"))])
def test_a_range_that_is_none_is_not_used(tmp_path, low_high):
    low, high = low_high
    path = write_tiff(tmp_path / "a.tif", np.array([[0, 500]], np.float32), low=float(low), high=float(high))
    assert f"floating-point numbers from 0 to 500, and {UNKNOWN}" in refused(path)


@pytest.mark.parametrize(
    ("pixels", "numbers"),
    [
        (np.array([[0.25, 0.5, 1]], np.float32), "floating-point numbers from 0.25 to 1"),
        (np.array([[-5, 70_000]], np.int32), "32-bit numbers from -5 to 70000"),
        (np.array([[0, 65535]], np.int32), "32-bit numbers from 0 to 65535"),
        (np.array([[0, 4095]], np.uint16), "16-bit numbers from 0 to 4095"),
    ],
    ids=["float", "int", "int of 16 bits", "12 bits in 16"],
)
def test_an_unknown_range_is_refused_by_name(tmp_path, pixels, numbers):
    assert refused(write_tiff(tmp_path / "a.tif", pixels)).startswith(f"its pixels are {numbers}, and {UNKNOWN}")


def test_12_bits_of_a_file_that_says_so(tmp_path):
    """Two samples in three bytes, high bits first: a TIFF made by hand, as PIL writes none."""
    samples = [0, 2048, 4095, 16]
    packed = int("".join(f"{sample:012b}" for sample in samples), 2).to_bytes(6, "big")
    entries = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1), (279, 6)]
    directory = b"".join(
        tag.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, value in entries
    )
    head = b"II*\0" + (8).to_bytes(4, "little") + len(entries).to_bytes(2, "little")
    (tmp_path / "a.tif").write_bytes((head + directory + bytes(4)).ljust(122, b"\0") + packed)
    assert grey_of(tmp_path / "a.tif") == [0, 128, 255, 1]


def test_16_bits(tmp_path):
    values = np.array([[0, 256 * 100 + 255, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert grey_of(tmp_path / name) == [0, 100, 255]
        Image.fromarray(np.zeros_like(values)).save(tmp_path / name)
        assert grey_of(tmp_path / name) == [0, 0, 0]
    for most, row in ((4095, [0, 2048, 4095]), (65535, [0, 512, 4000])):  # of a PGM the range is known, dark or not
        (tmp_path / "a.pgm").write_bytes(b"P5 3 1 %d\n" % most + np.array(row, dtype=">u2").tobytes())
        assert grey_of(tmp_path / "a.pgm") == [value * 65535 // most // 256 for value in row]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_colours_of_16_bits(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    bgr = np.array([[[0, 256 * 100, 65535], [300, 4000, 2]]], dtype=np.uint16)
    cv2.imwrite(str(path), bgr)
    assert load_image(path).tolist() == [[[255, 100, 0], [0, 15, 1]]] and examine_image(path).problem is None
    cv2.imwrite(str(path), np.full((2, 2, 3), 4095, dtype=np.uint16))  # 12 bits, which would come out black
    assert refused(path).startswith(f"its pixels are 16-bit numbers from 0 to 4095, and {UNKNOWN}")


def test_the_check_of_a_data_set_says_so(tmp_path, monkeypatch, capsys):
    content = coco_content()
    content["images"][1]["file_name"] = "b.tif"
    content["annotations"].append(content["annotations"][0] | {"id": 1, "image_id": 3})
    write_coco(tmp_path, content)
    write_tiff(tmp_path / "images" / "b.tif", np.full((HEIGHT, WIDTH), 0.5, np.float32))
    files = {"train": ["instances.json"], "val": ["instances.json"], "train_images": "images", "val_images": "images"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": {"root": str(tmp_path), **files}}))
    run_tool(monkeypatch, "check_data", tmp_path / "recipe.yaml")
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("train: ") and "b.tif" in line)
    assert "floating-point numbers from 0.5 to 0.5" in line and line.endswith("image left out with 1 object")
    assert lines[-1] == "training can go on"


# Turned and moving images

STORED = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
STORED[3:7, 5:9] = 255


def save_turned(path: Path, orientation: int, pixels: np.ndarray = STORED) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **({"quality": 100} if path.suffix != ".png" else {}))
    return path


EXIF_FORMATS = ["jpg", "png", "webp", "tif"]


@pytest.mark.parametrize("suffix", EXIF_FORMATS)
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_count_pixels_of_the_upright_image_where_its_size_says_so(tmp_path, orientation, suffix):
    """A camera held upright: stored in 40x30 and turned by a quarter; tools annotate 30x40."""
    x, y = {5: (3, 5), 6: (23, 5), 7: (23, 31), 8: (3, 31)}[orientation]
    content = coco_content([(x, y, 4, 4)])
    content["images"][0] |= {"file_name": f"turned.{suffix}", "width": HEIGHT, "height": WIDTH}
    content["images"][1]["file_name"] = f"stored.{suffix}"
    content["annotations"].append(content["annotations"][0] | {"id": 1, "image_id": 3, "bbox": [5, 3, 4, 4]})
    file, images = write_coco(tmp_path, content)
    for name in ("turned", "stored"):
        save_turned(images / f"{name}.{suffix}", orientation)
    dataset = DetectionDataset(read_coco(file, images))
    turned_by_pil = suffix == "tif"  # so that no program that reads by PIL has the stored pixels
    assert len(dataset) == 2 - turned_by_pil
    for index, size in enumerate([(3, WIDTH, HEIGHT), (3, HEIGHT, WIDTH)][: len(dataset)]):
        image, target = dataset[index]
        x1, y1, x2, y2 = target["boxes"][0].int().tolist()
        assert image.shape == size
        assert image[:, y1:y2, x1:x2].min() > 0.8 and image.sum() == pytest.approx(3 * 16, rel=0.05)
    assert len(dataset.dropped) == 1
    if turned_by_pil:
        sentence(dataset.annotations, "stored.tif: the image is 30x40 pixels, its annotations say 40x30")
    else:
        sentence(dataset.annotations, f"turned.{suffix}: EXIF orientation {orientation}: its boxes have the size of")
    assert read_image(images / f"turned.{suffix}").shape == (3, WIDTH, HEIGHT)


@pytest.mark.parametrize(("orientation", "size"), [(3, (WIDTH, HEIGHT)), (6, (30, 30))])
def test_where_the_size_cannot_tell_it_is_said(tmp_path, orientation, size):
    path = save_turned(tmp_path / "a.png", orientation, np.zeros((*size[::-1], 3), np.uint8))
    look = examine_image(path, *size)
    assert look.problem is None and not look.upright
    assert look.notes == (f"EXIF orientation {orientation}: its boxes are taken to count the pixels as stored",)


@pytest.mark.parametrize(
    ("sizes", "upright"),
    [
        ([(HEIGHT, WIDTH)] * 2, True),
        ([(WIDTH, HEIGHT)] * 2, False),
        ([(HEIGHT, WIDTH), (WIDTH, HEIGHT)], False),
        ([], False),
    ],
    ids=["upright", "stored", "both", "none"],
)
def test_where_the_size_cannot_tell_others_of_the_set_do(tmp_path, sizes, upright):
    """Turned by 180 degrees or mirrored, beside images turned by a quarter, which have sizes of either kind or none."""
    content = coco_content([(31, 23, 4, 4)] if upright else [(5, 3, 4, 4)])
    content["annotations"].append(content["annotations"][0] | {"id": 1, "image_id": 3})
    for number, (width, height) in enumerate(sizes):
        name = {"file_name": f"{number}.png", "width": width, "height": height}
        content["images"].append({"id": 10 + number} | name)
    file, images = write_coco(tmp_path, content)
    save_turned(images / "a.png", 3)
    save_turned(images / "b.png", 1)
    for number in range(len(sizes)):
        save_turned(images / f"{number}.png", 6 + 2 * number)
    dataset = DetectionDataset(read_coco(file, images))
    image, target = dataset[0]
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert image[:, y1:y2, x1:x2].min() > 0.8
    assert [record.upright for record in dataset.annotations.records[:2]] == [upright, False]
    if upright:
        sentence(
            dataset.annotations, "a.png: turned or mirrored by EXIF: its boxes are taken to count the upright image"
        )
    else:
        sentence(dataset.annotations, "a.png: EXIF orientation 3: its boxes are taken to count the pixels as stored")


def test_a_turned_image_without_a_size_is_told(tmp_path):
    write_voc(tmp_path, {"one": f"<annotation>{voc_object()}</annotation>"})
    save_turned(tmp_path / "VOC/JPEGImages/one.jpg", 6)
    found = read_voc(tmp_path, ["VOC/train"])
    assert (found.records[0].width, found.records[0].height) == (WIDTH, HEIGHT)
    assert len(found.dropped) == 1
    sentence(found, "one.xml: no image size, and one.jpg has EXIF orientation 6: boxes are taken to count")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_cost_nothing(tmp_path):
    path = write_image(tmp_path / "a.jpg")
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"\xff\xe1\x00\x12Exif\0\0II*\0\xff\xff\xff\xff\xff\xff" + content[2:])
    assert examine_image(path, WIDTH, HEIGHT, "full") == Look()
    assert read_image(path).shape == (3, HEIGHT, WIDTH)


def save_frames(path: Path) -> Path:
    """Three frames: grey 50, 100, 200."""
    frames = [Image.new("RGB", (WIDTH, HEIGHT), (grey, grey, grey)) for grey in (50, 100, 200)]
    options = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    return path


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_frame_or_page_is_used_and_told(tmp_path, suffix):
    content = coco_content()
    content["images"][0]["file_name"] = f"a.{suffix}"
    file, images = write_coco(tmp_path, content)
    save_frames(images / f"a.{suffix}")
    found = read_coco(file, images)
    assert len(found.dropped) == 1
    sentence(found, f"a.{suffix}: 3 frames or pages; only the first is used")
    assert DetectionDataset(found)[0][0].mul(255).unique().tolist() == [50]
    write_image(tmp_path / "classes/train/cat/b.png")
    save_frames(tmp_path / f"classes/train/cat/a.{suffix}")
    for in_memory in (True, False):
        data = ImageData(format="folder", root=tmp_path / "classes", size=32, in_memory=in_memory)
        (line,) = read_image_split(data, "train").dropped
        assert line.endswith(f"cat/a.{suffix}: 3 frames or pages; only the first is used")


# What is no image


def test_a_postscript_file_named_jpg_starts_no_program(tmp_path, monkeypatch):
    content = coco_content()
    file, images = write_coco(tmp_path, content)
    content["annotations"].append(content["annotations"][0] | {"id": 1, "image_id": 3})
    file, images = write_coco(tmp_path, content)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n"
    (images / "b.png").write_bytes(eps)

    def start(*_, **__):
        pytest.fail("a program is started")

    for name in ("Popen", "check_call", "run", "check_output"):
        monkeypatch.setattr(subprocess, name, start)
    monkeypatch.setattr(os, "system", start)
    found = read_coco(file, images, verify="full")
    sentence(found, "b.png: no readable image header (no image of a known format (allowed: JPEG, MPO, PNG", "1 object")
    with pytest.raises(ValueError, match="no image of a known format"):
        read_image(images / "b.png")


def test_a_huge_image_is_refused_by_its_header(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 30000 30000 255\n" + bytes(100))
    assert examine_image(tmp_path / "a.pgm").problem == "no readable image header (more than 178,956,970 pixels)"


def test_special_files_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    assert examine_image(tmp_path / "a.jpg").problem == "not a file"
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone.jpg")
    assert examine_image(tmp_path / "b.jpg").problem == "no such file"


# Folders of images


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_every_suffix_in_class_folders(tmp_path, in_memory):
    for index, suffix in enumerate(EXTENSIONS):
        grey = 10 * index + 20
        name = f"{index:02d}{suffix.upper() if index % 2 else suffix}"
        image = Image.new("RGB", (32, 32), (grey, grey, grey))
        kind = {".jfif": "JPEG", ".pgm": "PPM"}.get(suffix) or Image.registered_extensions()[suffix]
        (tmp_path / "train/cat").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "train/cat" / name, format=kind)
    images = read_image_split(ImageData(format="folder", root=tmp_path, size=32, in_memory=in_memory), "train")
    assert len(images) == len(EXTENSIONS) == 12 and images.dropped == ()
    if in_memory:
        means = images.pixels.float().mean(dim=(1, 2, 3)).tolist()
        assert means == pytest.approx([10 * index + 20 for index in range(12)], abs=2)


def test_hidden_files_links_and_loops(tmp_path):
    root, store = tmp_path / "train", tmp_path / "store"
    write_image(root / "cat" / "a.png")
    write_image(root / "cat" / "deep" / "er" / "b.png")
    for hidden in (".ipynb_checkpoints/a-checkpoint.png", "._a.png", "deep/.cache/sub/c.png", "deep/.DS_Store"):
        write_image(root / "cat" / "tmp.png").rename(root / "cat" / "tmp.png")
        (root / "cat" / hidden).parent.mkdir(parents=True, exist_ok=True)
        (root / "cat" / "tmp.png").rename(root / "cat" / hidden)
    write_image(root / ".ipynb_checkpoints" / "x.png")
    write_image(store / "dogs" / "d.png")
    (root / "dog").symlink_to(store / "dogs")  # a class folder that is a link
    (root / "cat" / "again").symlink_to(root / "cat")  # loops
    (store / "dogs" / "up").symlink_to(root)
    files = read_folder(root)
    assert files.classes == ("cat", "dog") and files.dropped == ()
    inside = [(str(path.relative_to(root)), label) for path, label in files.files]
    cats = [("cat/a.png", 0), ("cat/deep/er/b.png", 0)]
    assert inside[:2] == cats and ("dog/d.png", 1) in inside
    assert len({os.path.realpath(path) for path, label in files.files if label == 0}) == 2


def test_files_that_are_no_images_by_name_are_told(tmp_path):
    write_image(tmp_path / "train/cat/a.png")
    for name in ("b.heic", "c.HEIC", "notes", "d.svg"):
        (tmp_path / "train/cat" / name).touch()
    files = read_folder(tmp_path / "train")
    assert len(files) == 1
    assert files.dropped == (
        f"{tmp_path}/train/cat: 4 files without the name of an image (.heic, .svg, notes); left out",
    )


@pytest.mark.attempt("mutated images", 0)
def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path, monkeypatch):
    write_image(tmp_path / "train/cat/a.png")
    write_image(tmp_path / "train/cat/locked/b.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        read_folder(tmp_path / "train")
