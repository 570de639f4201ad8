"""Predictions over many files: bad ones among them, calls that are stopped, killed or run out of space, and resumed."""

import errno
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tracemalloc
import weakref
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import ROOT, start
from PIL import Image, features
from test_fold import scramble

import detection
from detection import draw
from detection.cli import main, predict
from detection.cli.film import FilmOutput
from detection.cli.output import JOURNAL, Output
from detection.config import parse_recipe
from detection.records import RunInfo
from detection.runs import Run
from detection.tasks import predictions, task_of
from detection.tasks.predictions import Prediction, in_batches

RECIPE = {
    "task": "detection",
    "model": {
        "detector": "retinanet",
        "backbone": {"name": "resnet18", "width": 0.125},
        "neck": {"out_channels": 16, "levels": ["c3", "c4"], "extra_levels": 0},
        "head": {"num_convs": 1, "norm": "group", "score_threshold": 0.0, "max_detections": 5},
        "min_size": [64],
        "max_size": 96,
    },
    "data": {"format": "synthetic", "classes": ["circle", "square", "star"], "workers": 0},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with random weights, which finds five boxes in every image."""
    config = parse_recipe(RECIPE, "recipe")
    torch.manual_seed(0)
    made = Run.create(tmp_path_factory.mktemp("batch") / "run", config, RunInfo(command="made by hand"))
    made.save(scramble(task_of(config).build_model()), "last")
    made.unlock()
    return made.folder


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def save_pictures(folder: Path, number: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{index}.png" for index in range(number)]
    for index, path in enumerate(paths):
        picture(index, (64, 48 + 16 * (index % 2))).save(path)
    return paths


def call(capsys, *arguments) -> tuple[int, str, str]:
    """The status of `hoyer-det predict ...`, and what it printed, on standard output and on standard error."""
    try:
        main(["predict", *map(str, arguments)])
        status = 0
    except SystemExit as stop:
        status = int(stop.code)
    return status, *capsys.readouterr()


def read(folder: Path, name: str) -> list[dict]:
    content = json.loads((folder / f"{name}.json").read_text())
    return content if name == "predictions" else content["images"]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What cannot be read


def bad_items(folder: Path) -> dict[str, str]:
    """Files in a folder that cannot be predicted on, and words of the sentence about each."""
    items = {}
    if features.check("avif"):
        picture(0).save(folder / "whole.avif")
        content = (folder / "whole.avif").read_bytes()
        (folder / "cut.avif").write_bytes(content[: len(content) // 2])
        (folder / "head.avif").write_bytes(content[:40])
        items = {"cut.avif": "does not decode", "head.avif": "does not decode"}
    picture(0).save(folder / "whole.dds")
    content = (folder / "whole.dds").read_bytes()
    (folder / "damaged.dds").write_bytes(content[:84] + b"????" + content[88:200])
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.png").touch()
    picture(0).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:3000])
    os.mkfifo(folder / "fifo.mp4")
    os.mkfifo(folder / "fifo.jpg")
    (folder / "round.png").symlink_to("round.png")
    (folder / "lost.png").symlink_to("nothing.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "text.mp4").write_text("no film")
    (folder / "folder.png").mkdir()
    return items | {
        "whole.dds": "no image of a known format",
        "damaged.dds": "no image of a known format",
        "text.jpg": "no image of a known format",
        "empty.png": "does not decode",
        "cut.png": "does not decode: image file is truncated",
        "fifo.mp4": "a FIFO, not opened",
        "fifo.jpg": "a FIFO, not opened",
        "round.png": "Too many levels of symbolic links",
        "lost.png": "a link to nothing, not opened",
        "device.png": "a device, not opened",
        "text.mp4": "no readable video",
        "folder.png": "no images in this folder",
        "none.png": "no such file or folder",
    }


def test_bad_items_stop_no_other(run, capsys, tmp_path, attempt):
    long, bytes_of = "\N{GREEK SMALL LETTER ALPHA}" * 125 + "x.png", b"\xff\xfe.png"
    assert len(os.fsencode(long)) == 255
    good = [tmp_path / "first.png", tmp_path / long, tmp_path / os.fsdecode(bytes_of), tmp_path / "last.png"]
    for seed, path in enumerate(good):
        picture(seed).save(path)
    bad = bad_items(tmp_path)
    sources = [*good[:3], *(tmp_path / name for name in bad), good[3]]
    out = tmp_path / "out"
    status, printed, error = call(capsys, run, *sources, "--score", "0", "--spikes", "--out", out)
    assert status == 1
    lines = [line for line in error.splitlines() if line.startswith("failed: ")]
    assert len(lines) == len(bad)
    for name, words in bad.items():
        with attempt("batch jobs"):
            assert [line for line in lines if f"/{name}: " in line and words in line], (name, lines)
    found, rows = read(out, "images"), read(out, "predictions")
    assert [entry["file_name"] for entry in found] == [str(path) for path in good]
    # Of the longest name as much as the suffix leaves of it.
    stem = "\N{GREEK SMALL LETTER ALPHA}" * 125 + "x"
    assert [entry["drawn"] for entry in found] == ["first.png", f"{stem}.png", os.fsdecode(bytes_of), "last.png"]
    assert "\\xff\\xfe.png: 5 detections" in printed and f"{long}: 5 detections" in printed
    names = {entry["drawn"] for entry in found} | {"images.json", "predictions.json"}
    spikes = {"first_spikes.png", f"{stem[:122]}_spikes.png", os.fsdecode(b"\xff\xfe_spikes.png"), "last_spikes.png"}
    assert {path.name for path in out.iterdir()} == names | spikes
    expected = detection.load(run, device="cpu").predict(good, score_threshold=0)
    for index, (path, prediction) in enumerate(zip(good, expected, strict=True), start=1):
        with attempt("batch jobs"):
            boxes = [row["bbox"] for row in rows if row["image_id"] == index]
            assert np.allclose(boxes, [row["bbox"] for row in prediction.to_results(index)], atol=1e-2), path
            assert len(boxes) == 5


def test_a_panel_has_the_size_of_its_image_and_not_of_its_drawing(run, capsys, monkeypatch, tmp_path):
    Image.new("RGB", (96, 64)).save(tmp_path / "small.png")  # is drawn larger
    drawn, titles = draw.draw_spike_maps, []
    monkeypatch.setattr(draw, "draw_spike_maps", lambda *rest, title: titles.append(title) or drawn(*rest, title=title))
    assert call(capsys, run, tmp_path / "small.png", "--spikes", "--out", tmp_path / "out")[0] == 0
    assert titles == ["small.png, 96\N{MULTIPLICATION SIGN}64 pixels"]


def test_a_file_by_several_names_is_one_image(monkeypatch, tmp_path):
    for name in ("b.png", "a.png", "film.mp4"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    given = ["b.png", "./a.png", "a.png", f"{tmp_path}/b.png", "sub/../a.png", "film.mp4", "./film.mp4", "."]
    (tmp_path / "sub").mkdir()
    assert predict.find_sources(given, failures := []) == (["b.png", "./a.png"], ["film.mp4"]) and failures == []


def test_globs_go_through_links_once(monkeypatch, tmp_path, attempt):
    paths = ["a/1.png", "a/b/2.png", "a/b/c/3.png", "elsewhere/4.png", "a/.hidden/5.png"]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "a/b/back").symlink_to("..")
    (tmp_path / "a/b/c/self").symlink_to(".")
    (tmp_path / "a/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/knot").symlink_to("knot")
    monkeypatch.chdir(tmp_path)
    for pattern, expected in {
        "a/**/*.png": ["a/1.png", "a/b/2.png", "a/b/c/3.png", "a/out/4.png"],
        "a/**/3.*": ["a/b/c/3.png"],
        "a/**/c/**/*.png": ["a/b/c/3.png"],
        "**/*.png": ["a/1.png", "a/b/2.png", "a/b/c/3.png", "a/out/4.png"],
        "a/b/**": ["a/b/2.png", "a/b/back/1.png", "a/b/c/3.png", "a/b/back/out/4.png"],
    }.items():
        with attempt("batch jobs"):
            failures = []
            images, films = predict.find_sources([pattern], failures)
            assert sorted(images) == sorted(expected), pattern
            assert films == []
            # "*" matches the knot, which leads nowhere.
            assert all("knot: Too many levels of symbolic links" in sentence for sentence in failures)
    with attempt("batch jobs"):
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith("/b"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        failures = []
        assert predict.find_sources(["a/**/*.png"], failures) == (["a/1.png", "a/out/4.png"], [])
        assert failures == ["a/b: this folder cannot be read (Permission denied)"]


# Memory


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_images_are_read_one_at_a_time(run, capsys, monkeypatch, tmp_path, attempt):
    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    png = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    huge = [tmp_path / f"huge{index}.png" for index in range(16)]
    for path in huge:
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    with attempt("batch jobs", 16):
        assert [len(names) for names in in_batches(map(str, huge), 32, predict.pixels_of_file)] == [1] * 16
    paths = save_pictures(tmp_path / "images", 6)
    picture(9, (8, 8)).save(tmp_path / "images" / "9.png")
    monkeypatch.setattr(predictions, "PIXELS", 64 * 64 + 64)
    seen, forward = [], predict.Call.predict
    monkeypatch.setattr(
        predict.Call,
        "predict",
        lambda self, pictures, names: (
            seen.append([tuple(each.shape[1:]) for each in pictures]) or forward(self, pictures, names)
        ),
    )
    with attempt("batch jobs", 7):
        out = tmp_path / "out"
        assert call(capsys, run, tmp_path / "images", "--no-images", "--out", out)[0] == 0
        assert seen == [[(48, 64)], [(64, 64)], [(48, 64)], [(64, 64)], [(48, 64)], [(64, 64), (8, 8)]]
        assert [entry["file_name"] for entry in read(out, "images")][:6] == list(map(str, paths))


def test_what_there_is_no_memory_for_is_left_out(run, capsys, monkeypatch, tmp_path, attempt):
    paths = save_pictures(tmp_path / "images", 4)
    ask = detection.predict.Predictor.predict
    plain = [each.boxes for each in detection.load(run, device="cpu").predict(paths, score_threshold=0)]

    def short(self, pictures, **options):
        if len(pictures) > 1 or torch.equal(pictures[0], detection.data.pictures.read_image(paths[2])):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return ask(self, pictures, **options)

    monkeypatch.setattr(detection.predict.Predictor, "predict", short)
    with attempt("batch jobs", 4):
        out = tmp_path / "out"
        status, _, error = call(capsys, run, tmp_path / "images", "--score", "0", "--no-images", "--out", out)
        assert status == 1
        assert f"failed: {paths[2]}: not enough memory for it in the network" in error
        assert [entry["file_name"] for entry in read(out, "images")] == [str(paths[index]) for index in (0, 1, 3)]
        boxes = np.array([row["bbox"] for row in read(out, "predictions")])
        expected = torch.cat([plain[index] for index in (0, 1, 3)]).numpy()
        assert np.allclose(boxes[:, :2], expected[:, :2], atol=1e-2)


def made_up(number: int) -> Prediction:
    """A prediction with so many boxes, in an image of a pixel."""
    boxes = torch.rand(number, 4)
    labels = torch.ones(number, dtype=torch.long)
    image = np.zeros((1, 1, 3), np.uint8)
    return Prediction(image, ("a",), None, boxes=boxes, scores=boxes[:, 0], labels=labels, category_ids=(7,))


def test_results_do_not_stay_in_memory(run, capsys, monkeypatch, tmp_path):
    output, sizes = Output(tmp_path / "many", {"arguments": []}, {"info": {}}), []
    tracemalloc.start()
    for index in range(300):
        output.add(made_up(100), f"{index}.png")
        output.finish(f"{index}.png", [])
        if index % 100 == 99:
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    output.close(complete=True)
    assert len(read(tmp_path / "many", "predictions")) == 30_000
    # 10,000 detections are some 5 MB as dicts and lists; what stays are the names of the images.
    assert sizes[2] - sizes[1] < 100_000
    alive, most, add, finish = [], [], Output.add, Output.finish

    def watched_add(self, found, *rest, **more):
        alive.append(weakref.ref(found))
        add(self, found, *rest, **more)

    def watched_finish(*some):
        most.append(sum(ref() is not None for ref in alive))
        finish(*some)

    monkeypatch.setattr(Output, "add", watched_add)
    monkeypatch.setattr(Output, "finish", watched_finish)
    save_pictures(tmp_path / "images", 13)
    assert call(capsys, run, tmp_path / "images", "--batch-size", "1", "--no-images", "--out", tmp_path / "out")[0] == 0
    assert len(most) == 13 and max(most) == predict.WINDOW


# Stopped and resumed


def write_film(path: Path, num_frames: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for index in range(num_frames):
        writer.write(np.random.default_rng(index).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    writer.release()


@pytest.fixture(scope="module")
def job(run, tmp_path_factory) -> tuple[list[str], Path]:
    """Arguments of a call over six images and a film, and the folder of one that nothing stopped."""
    folder = tmp_path_factory.mktemp("job")
    save_pictures(folder / "images", 6)
    write_film(folder / "film.avi", 5)
    arguments = [str(run), str(folder / "images"), str(folder / "film.avi"), "--score", "0", "--batch-size", "2"]
    main(["predict", *arguments, "--out", str(folder / "out")])
    return arguments, folder / "out"


def stop_at(monkeypatch, number: int, stop) -> None:
    """Calls `stop` once, when so many images or frames are written in a call."""
    add, count = Output.add, [0]

    def counted(self, *rest, **more):
        add(self, *rest, **more)
        count[0] += 1
        if count[0] == number:
            stop()

    monkeypatch.setattr(Output, "add", counted)


@pytest.mark.parametrize(
    ("numbers", "sent"),
    [((1,), signal.SIGTERM), ((4,), signal.SIGINT), ((2, 3), signal.SIGTERM), ((8,), signal.SIGTERM)],
)
def test_a_stopped_call_is_usable_and_goes_on(job, numbers, sent, capsys, tmp_path, attempt):
    (arguments, whole), out = job, tmp_path / "out"
    expected, begun = content_of(whole), 0
    for step, number in enumerate(numbers):
        with attempt("batch jobs"), pytest.MonkeyPatch.context() as monkeypatch:
            stop_at(monkeypatch, number, lambda: os.kill(os.getpid(), sent))
            given = ["--resume", out] if step else [*arguments, "--out", out]
            status, _, error = call(capsys, *given)
            assert status == 128 + sent
            assert f"stopped before the end; what was done until then is written, and --resume {out} goes on" in error
            images, rows = read(out, "images"), read(out, "predictions")
            # Of the last image, which the signal came in, there was no time to note that it is done.
            assert images == read(whole, "images")[: begun + number]
            assert rows == [row for row in read(whole, "predictions") if row["image_id"] <= begun + number]
            begun += number - 1
    with attempt("batch jobs"):
        status, printed, error = call(capsys, "--resume", out)
        assert (status, error) == (0, "") and f"written to {out}" in printed and "11 images" in printed
        assert content_of(out) == expected
    status, _, error = call(capsys, "--resume", out)
    assert status == 2 and f"no call was stopped there; it has no {JOURNAL}" in error


def kill_at(number: int, arguments: list[str]) -> None:
    """Predict, and be killed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at(monkeypatch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        main(["predict", *arguments])


def test_a_killed_call_goes_on(job, capsys, tmp_path, attempt):
    (arguments, whole), out = job, tmp_path / "out"
    for number in (4, 6):
        with attempt("batch jobs"):
            given = ["--resume", str(out)] if out.exists() else [*arguments, "--out", str(out)]
            process = start(kill_at, number, given, log=tmp_path / "log.txt")
            process.join(100)
            assert process.exitcode == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
            assert not (out / "images.json").exists()
    with attempt("batch jobs"):
        assert call(capsys, "--resume", out)[0] == 0
        assert content_of(out) == content_of(whole)


def test_a_full_disk_leaves_what_was_done(job, capsys, tmp_path, attempt):
    (arguments, whole), out = job, tmp_path / "out"
    append = Output._append

    def fill(self, *contents) -> None:
        if self.num_images == 3 and len(contents) == 2 and contents[0] != b"]":
            self._files[0].write(contents[0][:50])  # as much as there was space for
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, *contents)

    with attempt("full disks"), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Output, "_append", fill)
        status, _, error = call(capsys, *arguments, "--out", out)
        assert (
            status == 2 and f"No space left on device; what was done until then is written, and --resume {out}" in error
        )
        assert read(out, "images") == read(whole, "images")[:3]
        assert read(out, "predictions") == read(whole, "predictions")[:15]
    with attempt("full disks"):
        assert call(capsys, "--resume", out)[0] == 0
        assert content_of(out) == content_of(whole)
    with attempt("full disks"), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Image.Image, "save", raise_full)
        status, _, error = call(capsys, *arguments, "--out", tmp_path / "none")
        assert status == 2 and "No space left on device" in error and "--resume" not in error
        assert not (tmp_path / "none").exists()


def raise_full(*some, **more) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# The folder of a call


def stopped_folder(folder: Path, number: int = 4) -> Path:
    output = Output(folder, {"weights": "a", "arguments": ["run", "x.png"]}, {"info": {}})
    for index in range(number):
        output.add(made_up(2), f"{index}.png")
        output.finish(f"{index}.png", [])
    output.close(complete=False)
    return folder


def test_damaged_journals_are_refused_or_read_up_to_the_damage(tmp_path, attempt):
    folder = stopped_folder(tmp_path / "out")
    files, draw = content_of(folder), random.Random(0)
    whole = files[JOURNAL]
    lines = whole.splitlines(keepends=True)
    values = [None, -1, 1e400, "x", [], {}, [[]], True, "\ud800", 2**70]
    ends = range(0, len(whole), 7)
    cases: list[tuple[bytes, int | None]] = [(whole[:end], whole[:end].count(b"\n") - 1) for end in ends]
    others = [lines[0] + b"[" * 5000 + b"\n", b"[1]\n" + b"".join(lines[1:]), b"\x00" * 50 + b"\n"]
    cases += [(content, None) for content in others]
    for _ in range(60):
        changed = json.loads(lines[-1])
        changed[draw.choice(["source", "names", "sizes", "images", "found"])] = draw.choice(values)
        cases.append((b"".join(lines[:-1]) + json.dumps(changed).encode() + b"\n", None))
    refused = 0
    for content, done in cases:
        with attempt("damaged files"):
            for path in folder.iterdir():
                path.unlink()
            for name, text in (files | {JOURNAL: content}).items():
                (folder / name).write_bytes(text)
            try:
                output = Output(folder, {"weights": "a"}, {"info": {}})
            except ValueError as error:
                assert str(error).startswith(str(folder)) and "name another folder" in str(error)
                assert done is None, content
                refused += 1
                continue
            if done is not None:
                assert output.done == {f"{index}.png" for index in range(done)} or done < 1
                assert output.num_images == max(done, 0)
            output.close(complete=True)
    assert refused > 30


def test_another_call_is_refused_the_folder(run, capsys, tmp_path, attempt):
    folder = stopped_folder(tmp_path / "out")
    before = content_of(folder)
    picture(0).save(tmp_path / "x.png")
    with attempt("two processes"):  # of other weights
        status, _, error = call(capsys, run, tmp_path / "x.png", "--out", folder)
        assert status == 2 and f"error: {folder}: begun with weights a, not " in error
        assert content_of(folder) == before
    code = (
        "import sys; from pathlib import Path; from detection.files import lock_folder\n"
        "lock_folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with attempt("two processes"):
        held = [sys.executable, "-c", code, str(folder)]
        with subprocess.Popen(held, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(BlockingIOError, match=rf"another process is writing .*\(process {process.pid} on"):
                Output(folder, {"weights": "a"}, {"info": {}})
            process.stdin.close()
        assert {**content_of(folder), ".lock": b""} == {**before, ".lock": b""}
    first, second = (Output(tmp_path / "new", {"arguments": []}, {"info": {}}) for _ in range(2))
    first.add(made_up(2), "1.png")
    with attempt("two processes"), pytest.raises(BlockingIOError, match="this process is writing into it already"):
        second.add(made_up(2), "2.png")
    first.close(complete=True)
    with attempt("two processes"):
        with pytest.raises(FileExistsError, match="another call has just written into it"):
            second.add(made_up(2), "2.png")
        assert [entry["file_name"] for entry in read(tmp_path / "new", "images")] == ["1.png"]


def test_resume_takes_nothing_else(capsys, tmp_path):
    for more in (["x.png"], ["--score", "0.5"]):
        for given in (["--resume", tmp_path], [f"--resume={tmp_path}"]):
            status, _, error = call(capsys, *given, *more)
            assert status == 2 and "has its own command line: leave all else out" in error
    (tmp_path / JOURNAL).write_bytes(b'{"weights": 1}\n')
    status, _, error = call(capsys, "--resume", tmp_path)
    assert status == 2 and f"{JOURNAL}: damaged; remove {tmp_path}, and predict again" in error


def test_a_film_that_cannot_be_written_says_so_when_it_is_closed_too(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2.VideoWriter, "isOpened", lambda self: False)
    output = FilmOutput(tmp_path / "film.mp4", 25)
    with pytest.raises(OSError, match=r"film.mp4: OpenCV cannot write MPEG-4 films here"):
        try:
            output.write(np.zeros((32, 32, 3), np.uint8))
        finally:
            output.close()
