"""Files of events and boxes, byte by byte and beside tonic; frames and boxes by hand."""

from __future__ import annotations

import os
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import ARCHIVES

from detection.config.schema import ImageAugment
from detection.data.events import (
    BOX,
    EVENT,
    Recording,
    events_to_frames,
    filter_boxes,
    frames_to_pixels,
    label_times,
    list_recordings,
    read_boxes,
    read_events,
    write_boxes,
    write_events,
)
from detection.data.image_batches import augment_batch

HEADER = b"% Data file containing Event2D events.\n% Version 2\n% Height 240\n% Width 304\n"
EVENTS = np.array([(5, 0, 0, 0), (5, 303, 239, 1), (70_000, 17, 200, 1), (4_000_000_000, 1, 2, 0)], EVENT)
# Microseconds, then p << 28 | y << 14 | x, in numbers that were worked out by hand.
PACKED = bytes.fromhex("05000000 00000000  05000000 2fc13b10  70110100 11003210  00286bee 01800000")


def write(path, content: bytes):
    path.write_bytes(content)
    return path


@pytest.fixture
def sample():
    """sample("sample_ncars.dat") -> the recording of a publisher; skipped where there is none."""

    def find(name: str):
        path = ARCHIVES / "events" / name
        if not path.is_file():
            (pytest.fail if os.environ.get("REQUIRE_REAL_DATA") else pytest.skip)(f"no real data: {path} is missing")
        return path

    return find


# .dat files


def test_a_dat_file_byte_by_byte(tmp_path):
    written = tmp_path / "a_td.dat"
    write_events(written, [EVENTS[:1], EVENTS[1:]], width=304, height=240)
    assert written.read_bytes() == HEADER + bytes([0, 8]) + PACKED

    recording = Recording(written)
    assert (recording.width, recording.height, recording.num_events) == (304, 240, 4)
    assert (recording.start, recording.end) == (5, 4_000_000_000)
    assert [tuple(row) for row in recording.between(0, 1 << 32).tolist()] == EVENTS.tolist()
    assert recording.between(5, 5).tolist() == recording.between(6, 70_000).tolist() == []
    assert recording.between(5, 70_000).tolist() == EVENTS[:2].tolist()
    assert recording.between(6, 70_001).tolist() == EVENTS[2:3].tolist()
    assert [len(chunk) for chunk in recording.chunks(3)] == [3, 1]
    # The other type of event, a header without a size, polarity 15 (all of its 4 bits).
    other = write(
        tmp_path / "b.dat", b"% Version 2\n" + bytes([12, 8]) + struct.pack("<2I", 7, 0xF0000000 | 3 << 14 | 9)
    )
    assert Recording(other).width is None and Recording(other).between(0, 8).tolist() == [(7, 9, 3, 1)]


START = HEADER + bytes([0, 8])
DAMAGED = {
    "empty": (b"", "an empty file, 0 bytes"),
    "foreign": (b"\x89PNG\r\n" + bytes(99), "no .dat file of events; expected lines that begin with '% '"),
    "header alone": (HEADER, "no .dat file of events"),
    "trigger events": (HEADER + bytes([14, 8]) + PACKED, "no .dat file of events"),
    "endless line": (b"% " + b"a" * 50_000, "no .dat file of events"),
    "no events": (START, "a header without events"),
    "cut off": (START + PACKED[:-3], "cut off in the middle of an event, 5 bytes behind 3 whole ones"),
    "clock": (START + struct.pack("<8I", 10, 0, 50, 0, 20, 0, 60, 0), "jumps backwards, from 50 to 20 microseconds"),
    "clock, at the end": (START + struct.pack("<4I", 50, 0, 20, 0), "jumps backwards, from 50 to 20 microseconds"),
    "outside": (START + struct.pack("<2I", 10, 304), "events up to x 304, y 0 of a sensor of 304x240"),
}


@pytest.mark.parametrize(
    "kind",
    [*DAMAGED],
)
def test_a_damaged_dat_file_is_a_sentence_with_its_name(kind, tmp_path, attempt):
    content, expected = DAMAGED[kind]
    path = write(tmp_path / "damaged.dat", content)
    with attempt("damaged files"):
        for read in (
            lambda: Recording(path).between(0, 1 << 32),
            lambda: list(Recording(path).chunks(2)),
            lambda: read_events(path),
        ):
            with pytest.raises(ValueError) as caught:
                read()
            assert str(caught.value).startswith(f"{path}: ") and expected in str(caught.value)


def test_the_writer_refuses_what_a_dat_file_cannot_hold(tmp_path):
    path = tmp_path / "a.dat"
    for events, width, expected in (
        (EVENTS[[2, 0]], 304, "times must not fall"),
        (np.array([(1 << 32, 0, 0, 0)], EVENT), 304, "end before 2^32 microseconds"),
        (EVENTS, 303, "x must lie in 0 to 302"),
        (EVENTS, 20_000, "and 20000 in 1 to 16384"),
    ):
        with pytest.raises(ValueError, match=r"a\.dat: ") as caught:
            write_events(path, [events], width=width, height=240)
        assert expected in str(caught.value)


def test_a_recording_is_read_in_bounded_memory(tmp_path):
    """20 million events, 160 MB, in slices of a second: never more than some slices' 13 bytes per event."""
    million = np.zeros(1_000_000, EVENT)
    million["x"], million["p"] = np.arange(1_000_000) % 304, 1

    def seconds():
        for second in range(20):
            million["t"] = 1_000_000 * second + np.arange(1_000_000)
            yield million

    path = tmp_path / "long_td.dat"
    write_events(path, seconds(), width=304, height=240)
    assert path.stat().st_size == 160_000_000 + len(HEADER) + 2
    tracemalloc.start()
    recording = Recording(path)
    total = 0
    for second in range(20):
        events = recording.between(1_000_000 * second, 1_000_000 * (second + 1))
        assert (events["t"][0], events["t"][-1], len(events)) == (10**6 * second, 10**6 * (second + 1) - 1, 10**6)
        total += int(events["x"].sum(dtype=np.int64))
    last = recording.between(19_999_990, 1 << 32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 20 * int(million["x"].sum(dtype=np.int64)) and len(last) == 10
    assert peak < 60e6, peak


# Box files


def boxes(*rows) -> np.ndarray:
    """(t, x, y, w, h, class, track) per box."""
    return np.array([(*row, 1.0) for row in rows], BOX)


def test_box_files_of_all_spellings(tmp_path):
    rows = boxes((2_000_000, 1.5, 2, 30, 40, 1, 7), (1_000_000, 10, 20, 50, 60, 0, 8))
    write_boxes(tmp_path / "a_bbox.npy", rows)
    assert read_boxes(tmp_path / "a_bbox.npy").tolist() == rows[::-1].tolist()
    # GEN1's own: other names, types and order.
    gen1 = [("ts", "<u8"), *((name, "<f4") for name in "xywh"), ("class_id", "u1"), ("confidence", "<f4")]
    gen1 = np.array([(600_000, 3, 4, 31, 41, 1, 0.5, 9)], [*gen1, ("track_id", "<u4")])
    np.save(tmp_path / "b_bbox.npy", gen1)
    assert read_boxes(tmp_path / "b_bbox.npy").tolist() == [(600_000, 3, 4, 31, 41, 1, 9, 0.5)]
    # An array of the .npy format, version 1, written down by hand.
    fields = "[('t', '<i8'), ('x', '<f4'), ('y', '<f4'), ('w', '<f4'), ('h', '<f4'), ('class_id', 'u1')]"
    head = f"{{'descr': {fields}, 'fortran_order': False, 'shape': (1,), }}\n".encode()
    data = struct.pack("<q4fB", 9, 1, 2, 3, 4, 1)
    path = write(tmp_path / "c_bbox.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data)
    assert read_boxes(path).tolist() == [(9, 1, 2, 3, 4, 1, 0, 0)]

    whole = (tmp_path / "a_bbox.npy").read_bytes()
    np.save(tmp_path / "objects.npy", np.array([{"t": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "plain.npy", np.zeros((3, 8)))
    np.save(tmp_path / "rows.npy", rows[None])
    np.save(tmp_path / "nan.npy", np.full(2, np.nan, [(name, "<f4") for name in BOX.names]))
    np.save(tmp_path / "no_class.npy", rows[["t", "x", "y", "w", "h"]])
    np.save(tmp_path / "pairs.npy", np.zeros(2, [*BOX.descr[:4], ("h", "<f4", 2), ("class_id", "u1")]))
    np.save(tmp_path / "texts.npy", np.zeros(2, [("t", "U3"), *BOX.descr[1:]]))
    write(tmp_path / "zip.npy", b"PK\x03\x04 cut off")
    write(tmp_path / "header.npy", b"\x93NUMPY\x01\x00\x05\x00{abc\n")
    write(tmp_path / "cut.npy", whole[:-5])
    write(tmp_path / "empty.npy", b"")
    write(tmp_path / "foreign.npy", b"t,x,y,w,h,class_id")
    for name, expected in (
        ("objects", "no whole .npy file of boxes"),
        ("plain", "no rows of boxes; missing fields: t, x, y, w, h, class_id"),
        ("rows", "no rows of boxes; its shape is (1, 2)"),
        ("nan", "the field t has numbers that are not finite"),
        ("no_class", "missing fields: class_id (found: t, x, y, w, h)"),
        ("pairs", "no rows of boxes; the field h is ('<f4', (2,)), no number"),
        ("texts", "no rows of boxes; the field t is <U3, no number"),
        ("zip", "no whole .npy file of boxes"),
        ("header", "no whole .npy file of boxes"),
        ("cut", "no whole .npy file of boxes"),
        ("empty", "an empty file, 0 bytes"),
        ("foreign", "no whole .npy file of boxes"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.npy: ") as caught:
            read_boxes(tmp_path / f"{name}.npy")
        assert expected in str(caught.value)


def test_the_filter_of_the_benchmark():
    rows = boxes(
        (500_000, 0, 0, 50, 50, 0, 1),  # at half a second: not yet
        (500_001, 0, 0, 18, 24, 0, 2),  # a diagonal of 30
        (600_000, 0, 0, 17.9, 24, 0, 3),
        (600_000, 0, 0, 10, 40, 0, 4),
        (600_000, 0, 0, 9.9, 40, 0, 5),
        (600_000, 0, 0, 40, 9.9, 0, 6),
    )
    assert filter_boxes(rows)["track_id"].tolist() == [2, 4]
    assert filter_boxes(rows, skip=0, min_diagonal=0, min_side=0)["track_id"].tolist() == [1, 2, 3, 4, 5, 6]


def test_boxes_of_a_frame_lie_in_a_window_of_time():
    rows = boxes(*((t, 0, 0, t, 9, 0, track) for t, track in ((100, 1), (100, 2), (130, 1), (200, 1), (231, 3))))
    exact = [(time, found["w"].tolist()) for time, found in label_times(rows)]
    assert exact == [(100, [100, 100]), (130, [130]), (200, [200]), (231, [231])]
    # Of track 1 the last box alone; 231 is 31 microseconds after 200.
    assert [(time, found["w"].tolist()) for time, found in label_times(rows, 30)] == [
        (130, [100, 130]),
        (200, [200]),
        (231, [231]),
    ]
    rows["track_id"] = 0
    assert [len(found) for _, found in label_times(rows, 30)] == [3, 1, 1]
    assert list(label_times(rows[:0])) == []


# Frames


def test_frames_by_time_and_by_count():
    events = np.array([(0, 0, 0, 1), (10, 1, 0, 0), (20, 1, 0, 0), (99, 2, 1, 1), (100, 2, 1, 1)], EVENT)
    frames = events_to_frames(events, (2, 3), 2, window=(0, 200))
    assert frames.shape == (2, 2, 2, 3) and frames.dtype == torch.float32
    # Steps [0, 100) and [100, 200); channel 0 darker, 1 brighter.
    assert frames.tolist() == [
        [[[0, 2, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 1]]],
        [[[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]]],
    ]
    # Without a window: 0 to 100, both included, in two halves of 50.5.
    assert events_to_frames(events, (2, 3), 2).sum(dim=(1, 2, 3)).tolist() == [3, 2]
    # Event i of 5 falls into step i * 3 // 5: 0, 0, 1, 1, 2.
    by_count = events_to_frames(events, (2, 3), 3, by="count")
    assert by_count.sum(dim=(1, 2, 3)).tolist() == [2, 2, 1]
    assert by_count[1].tolist() == [[[0, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]]]
    assert events_to_frames(events[:0], (2, 3), 4).tolist() == torch.zeros(4, 2, 2, 3).tolist()
    for wrong, options in (
        ("an event at x 2, y 1 lies outside of a sensor of 2x2", {"size": (2, 2)}),
        ("reach out of the window 0 to 100", {"window": (0, 100)}),
        ("expected at least one step", {"steps": 0}),
        ("by 'time' or 'count'", {"by": "number"}),
    ):
        with pytest.raises(ValueError, match=wrong):
            events_to_frames(events, **{"size": (2, 3), "steps": 2} | options)


def test_frames_as_pixels():
    frames = torch.zeros(2, 2, 3, 6)
    frames[0, 1, 0, :3] = torch.tensor([1.0, 3, 7])
    frames[1, 0] = 1
    pixels = frames_to_pixels(frames, (3, 6), 4)
    assert pixels.shape == (4, 3, 6) and pixels.dtype == torch.uint8
    assert pixels[1, 0].tolist() == [64, 191, 255, 0, 0, 0] and pixels[2].unique().tolist() == [64]
    small = frames_to_pixels(frames, (1, 2), 4)  # means over 3x3 pixels: 11 / 9, and 1
    assert small[:, 0].tolist() == [[0, 0], [round(255 * 11 / 36), 0], [64, 64], [0, 0]]


def test_flip_and_shift_move_all_steps_of_a_recording_together():
    images = torch.arange(2 * 4 * 9, dtype=torch.uint8).reshape(2, 4, 3, 3)
    drawn = {"top": torch.tensor([2, 1]), "left": torch.tensor([1, 0]), "flip": torch.tensor([False, True])}
    moved = augment_batch(images, ImageAugment(padding=1), drawn)
    assert moved[0, :, :2].tolist() == images[0, :, 1:].tolist() and not moved[0, :, 2].any()
    # To the right by one, then mirrored.
    assert moved[1, :, :, :2].tolist() == images[1, :, :, :2].flip(-1).tolist() and not moved[1, :, :, 2].any()


# Files of classified recordings


def decode_bin(content: bytes) -> list[tuple[int, int, int, int]]:
    """N-MNIST's 40 bits one by one, as its publishers describe them: x, y, then 1 bit polarity and 23 bits time."""
    rows, late = [], 0
    for x, y, *rest in (content[start : start + 5] for start in range(0, len(content), 5)):
        number = int.from_bytes(bytes(rest), "big")
        if y == 240:
            late += 1 << 13
        else:
            rows.append(((number & 0x7FFFFF) + late, x, y, number >> 23))
    return rows


def test_a_recording_of_n_mnist(sample):
    pytest.importorskip("tonic", reason="pip install hoyer-det[events]")
    path = sample("sample_nmnist.bin")
    events, size = read_events(path)
    assert size == (34, 34) and len(events) == 4325
    assert events.tolist() == decode_bin(path.read_bytes())
    import tonic.io

    theirs = tonic.io.read_mnist_file(str(path), dtype=tonic.io.events_struct)
    assert all((events[name] == theirs[name]).all() for name in "txyp")


def test_a_recording_of_n_cars(sample):
    path = sample("sample_ncars.dat")
    events, size = read_events(path)
    words = struct.unpack("<4018I", path.read_bytes()[-2009 * 8 :])
    rows = [
        (t, word % 2**14, word // 2**14 % 2**14, word // 2**28) for t, word in zip(words[::2], words[1::2], strict=True)
    ]
    assert events.tolist() == rows and rows[:2] == [(0, 25, 8, 0), (35, 67, 35, 0)]
    assert size == (max(row[2] for row in rows) + 1, max(row[1] for row in rows) + 1)
    expelliarmus = pytest.importorskip("expelliarmus", reason="tonic's decoder: pip install hoyer-det[events]")
    theirs = expelliarmus.Wizard("dat").read(str(path))
    assert all((events[name] == theirs[name]).all() for name in "txyp")


def test_a_recording_of_dvs_cifar10(sample, tmp_path):
    tonic = pytest.importorskip("tonic", reason="pip install hoyer-det[events]")
    head = sample("sample_aedat_header.aedat").read_bytes()
    # Bits 8 to 14 are 3, bits 1 to 7 are 5; the last bit 0: brighter.
    addresses = [(3 << 8 | 5 << 1), (127 << 8 | 0 << 1 | 1), 0x23 << 8]
    content = b"".join(struct.pack(">2I", address, 1000 + index) for index, address in enumerate(addresses))
    path = write(tmp_path / "cifar10_cat_0.aedat", head + content)
    events, size = read_events(path)
    assert size == (128, 128)
    assert events.tolist() == [(1000, 124, 122, 1), (1001, 0, 127, 0), (1002, 92, 127, 1)]
    _, start, _ = tonic.io.read_aedat_header_from_file(str(path))
    theirs = tonic.io.get_aer_events_from_file(str(path), 2.0, start)
    assert theirs["address"].tolist() == addresses and theirs["timeStamp"].tolist() == events["t"].tolist()
    for damaged, expected in (
        (head, "no events"),
        (head + content[:-1], "cut off in the middle of an event, 7 bytes behind 2 whole ones"),
        (head + content[8:16] + content[:8], "the clock jumps backwards, from 1001 to 1000"),
        (content, "no .aedat file of version 2"),
        (b"#!AER-DAT3.1\r\n" + content, "no .aedat file of version 2"),
        (b"", "an empty file, 0 bytes"),
    ):
        with pytest.raises(ValueError, match=r"damaged\.aedat: ") as caught:
            read_events(write(tmp_path / "damaged.aedat", damaged))
        assert expected in str(caught.value)


def test_without_tonic_its_files_are_refused_by_name(tmp_path, monkeypatch):
    path = write(tmp_path / "00001.bin", bytes([1, 2, 0x80, 0, 5]))
    monkeypatch.setitem(sys.modules, "tonic", None)
    with pytest.raises(ModuleNotFoundError, match=r"00001\.bin: tonic, .* pip install hoyer-det\[events\]"):
        read_events(path)
    for name, content, expected in (
        ("00002.bin", bytes(7), "7 bytes are no multiple of the 5 of an event"),
        ("00003.bin", b"", "an empty file, 0 bytes"),
        ("00004.txt", b"a", "no file of events (allowed: .dat, .bin, .aedat)"),
    ):
        with pytest.raises(ValueError, match=f"{name}: ") as caught:
            read_events(write(tmp_path / name, content))
        assert expected in str(caught.value)


def test_recordings_by_class(tmp_path):
    for name in ("cat_0", "cat_1", "cat_2", "cat_10", "cat_9"):
        (tmp_path / "cat").mkdir(exist_ok=True)
        write(tmp_path / "cat" / f"{name}.aedat", b"")
    (tmp_path / "ant").mkdir()
    for number in range(5):
        write(tmp_path / "ant" / f"{number}.bin", b"")
    for name in ("notes.txt", "._cat_0.aedat"):  # the latter beside each file of a Mac's archive
        write(tmp_path / "cat" / name, b"")
    files, classes = list_recordings(tmp_path, "", train=True, train_share=0.6)
    assert classes == ("ant", "cat")
    assert [(path.stem, label) for path, label in files if label] == [("cat_0", 1), ("cat_1", 1), ("cat_2", 1)]
    files, _ = list_recordings(tmp_path, "", train=False, train_share=0.6, classes=["cat"])
    assert [(path.stem, label) for path, label in files] == [("cat_9", 0), ("cat_10", 0)]
    (tmp_path / "Train" / "dog").mkdir(parents=True)
    (tmp_path / "Train" / "cat").mkdir()
    write(tmp_path / "Train" / "dog" / "1.dat", b"")
    dogs, _ = list_recordings(tmp_path, "Train", train=False, classes=["dog"])
    assert len(dogs) == 1  # a folder of its own: all of it
    for split, options, expected in (
        ("Test", {}, "Test: no such folder; expected one folder of recordings per class"),
        ("Train/dog", {}, "dog: no class folders in it"),
        ("Train/dog", {"classes": ["dog"]}, "dog: no class folders in it"),
        ("Train", {"classes": ["dig"]}, "no class 'dig'; did you mean 'dog'"),
        ("Train", {"classes": ["cat"]}, "cat: no recordings in it (allowed: .dat"),
        ("", {"train_share": 0.99, "classes": ["ant"]}, "train_share 0.99 of 5 recordings leaves none for validation"),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            list_recordings(tmp_path, split, **{"train": False} | options)
        assert expected in str(caught.value)
