"""CSV files with a header, an object per row -> `Annotations`."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from detection.data.image_files import examine_image, is_image, size_as_stored, visible_files
from detection.data.records import (
    Annotations,
    Layout,
    RawObject,
    Record,
    Verify,
    build_annotations,
    build_record,
    check_classes,
    few,
    finite_number,
    image_left_out,
    others_left_out,
    outside_of,
    require_file,
    require_folder,
)
from detection.files import read_text, require_size
from detection.text import plural

MAX_BYTES = 2**31
# What columns are called, by what they mean; letter case, spaces and _ do not count.
FILE = ("filename", "file", "image", "imagename", "imagepath", "path", "filepath", "imageid", "img")
CLASS = ("class", "label", "classname", "labelname", "category", "categoryname", "name")
SPLIT = ("split", "set", "subset")
CORNERS = (
    ("xmin", "ymin", "xmax", "ymax"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
    ("bboxxmin", "bboxymin", "bboxxmax", "bboxymax"),
)
SIDES = (
    ("x", "y", "w", "h"),
    ("bboxx", "bboxy", "bboxw", "bboxh"),
    ("bboxx", "bboxy", "bboxwidth", "bboxheight"),
    ("left", "top", "w", "h"),
)
SIZES = (("width", "height"), ("imagewidth", "imageheight"), ("imgwidth", "imgheight"))
BARE = (("x", "y", "width", "height"), ("left", "top", "width", "height"))  # the last two are then the box's
ALLOWED = (
    "a column filename, a column class, and xmin, ymin, xmax, ymax, or x, y, w, h with x and y of the upper left corner"
)
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


class Header(NamedTuple):
    """The columns of a file by position; None where there is none."""

    file: int
    label: int
    box: tuple[int, ...]
    layout: Layout
    size: tuple[int, int] | None
    split: int | None


class Row(NamedTuple):
    """An object, or an image without any: then box and name are empty."""

    line: int
    name: str
    box: list[str]
    size: tuple[str, str] | None


class Table(NamedTuple):
    """The rows of a file by image, in the file's order, for one split or for all; images of other splits by name."""

    images: dict[str, list[Row]]
    layout: Layout
    split_values: Counter[str]
    others: set[str]


def read_csv(
    source: Path,
    split: str,
    folder: Path | None = None,
    classes: Sequence[str] = (),
    *,
    value: str | None = None,
    verify: Verify = "header",
) -> Annotations:
    """Return images and boxes of a CSV file; an image that has a row without a box has no objects.

    So have images of the folder without a row, where no other CSV file lies in it or beside this one: else they may
    belong to that one, and are not used.

    Args:
        source: the file; comma, semicolon or tab between columns. Its header names `filename`, `class` and
            `xmin, ymin, xmax, ymax` in pixels, counted from 0, or `x, y, w, h`; `width, height`, the image's, and
            `split` are optional.
        split: "train" or "val": the rows to take, if there is a column `split`.
        folder: that names of images start from; None: that of the file.
        classes: names to keep, label 1 first; empty: all that the file has, sorted.
        value: of the column `split`, in place of the usual ones.
        verify: how images are checked, see `examine_image`; those that fail are left out.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a header that is not understood or lacks a column, boxes that are shares of the image, or nothing to
            train on.
    """
    require_file(source, "a CSV file with a header, an object per row")
    folder = require_folder(source.parent if folder is None else folder, f"the images of {source.name}")
    check_classes(classes)
    dropped: list[str] = []
    table = read_table(source, dropped, SPLITS.get(split, ()) if value is None else (value.lower(),))
    if value is not None and not table.split_values:
        raise ValueError(f"{source}: its header has no column split, of which {value!r} would be a value")
    found = {row.name for rows in table.images.values() for row in rows if row.box}
    categories = tuple(classes) or tuple(sorted(found))
    images = _files(table, folder, source, dropped)
    dropped += outside_of(folder, images, source)
    kept, others = {name: label for label, name in enumerate(categories, start=1)}, Counter()
    records = []
    for number, (path, rows) in enumerate(images.items(), start=1):
        objects = []
        for row in rows:
            if row.box and row.name in kept:
                objects.append(RawObject(f"line {row.line}", row.box, kept[row.name], False))
            elif row.box:
                others[row.name] += 1
        size = _size(path, rows, source, dropped)
        if size is None:
            problem = examine_image(path).problem or "no readable image header"
            dropped.append(f"{path}: {problem}; {image_left_out(len(objects))}")
        else:
            layout = table.layout
            records.append(build_record(path, number, *size, objects, layout=layout, source=source, dropped=dropped))
    _refuse_shares(records, source)
    dropped += others_left_out(others, categories, source)
    ids = range(1, len(categories) + 1)
    return build_annotations(records, categories, ids, dropped, source=str(source), verify=verify)


def read_table(source: Path, dropped: list[str], values: Sequence[str] = ()) -> Table:
    """Return the rows of a file, those of the column `split` with one of the `values`; empty: all.

    Raises:
        ValueError: it is no CSV file with a header that is understood, or no row has one of the values.
    """
    rows = rows_of(source)
    columns = next(rows, (1, []))[1]
    header = read_header(columns, source)
    images: dict[str, list[Row]] = defaultdict(list)
    seen: dict[tuple[str, ...], int] = {}
    counts, others = Counter[str](), set[str]()
    for line, cells in rows:
        cells = [cell.strip() for cell in cells] + [""] * len(columns)
        split = "" if header.split is None else cells[header.split].lower()
        counts[split] += 1
        if header.split is not None and values and split not in values:
            others.add(cells[header.file])
            continue
        box = [cells[index] for index in header.box]
        size = None if header.size is None else (cells[header.size[0]], cells[header.size[1]])
        name, label = cells[header.file], cells[header.label]
        end = "object left out" if any(box) else "nothing to read in it"
        if not name or "\0" in name:
            dropped.append(f"{source}: line {line} names no image; {end}")
        elif any(box) and not label:
            dropped.append(f"{source}: line {line} has no class; {end}")
        elif any(box) and (name, label, *box) in seen:
            dropped.append(f"{source}: line {line} is line {seen[name, label, *box]} once more; {end}")
        else:
            seen[name, label, *box] = line
            images[name].append(Row(line, label, box if any(box) else [], size))
    if header.split is not None and values and not images:
        there = few(sorted(counts))
        raise ValueError(f"{source}: no row whose split is {' or '.join(values)} (found: {there})")
    return Table(dict(images), header.layout, counts if header.split is not None else Counter(), others)


def rows_of(source: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield number and cells of each line that has any; raises ValueError for what is no CSV file."""
    require_size(source, MAX_BYTES)
    text = read_text(source)
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=max(",;\t", key=first.count), strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(f"{source}: not a CSV file: line {reader.line_num}: {error}") from None


def read_header(cells: Sequence[str], source: Path) -> Header:
    """Return the columns of a header.

    Raises:
        ValueError: it lacks one, or names one twice.
    """
    names = ["".join(letter for letter in cell.lower() if letter.isalnum()) for cell in cells]
    place = {name: index for index, name in enumerate(names)}

    def first(choices: Sequence[str]) -> int | None:
        return next((place[name] for name in choices if name in place), None)

    def group(choices: Sequence[Sequence[str]]) -> tuple[int, ...] | None:
        return next((tuple(place[name] for name in each) for each in choices if place.keys() >= set(each)), None)

    corners, sides = group(CORNERS), group(SIDES)
    box, size = corners or sides, group(SIZES)
    if box is None and (box := group(BARE)) is not None:
        size = group(SIZES[1:])
    file, label = first(FILE), first(CLASS)
    if file is None or label is None or box is None:
        raise ValueError(f"{source}: its header has the columns {few(map(repr, cells))}; expected {ALLOWED}")
    split = first(SPLIT)
    used = [file, label, *box, *(size or ()), *(() if split is None else (split,))]
    twice = [cells[index] for index in used if names.count(names[index]) > 1]
    if twice or len(set(used)) < len(used):
        raise ValueError(f"{source}: its header has the column {(twice or [cells[file]])[0]!r} twice")
    return Header(file, label, box, "corners" if corners else "coco", size, split)


def _files(table: Table, folder: Path, source: Path, dropped: list[str]) -> dict[Path, list[Row]]:
    """The rows of each image file, sorted by path; with those that have no row, where all belong to the file."""
    images: dict[Path, list[Row]] = defaultdict(list)
    for name, rows in table.images.items():
        images[_file(name, folder)] += rows
    known = {os.path.normpath(path) for path in (*images, *(_file(name, folder) for name in table.others))}
    more = [path for path in visible_files(folder) if is_image(path) and os.path.normpath(path) not in known]
    place = source.parent
    near = place.resolve() in (folder.resolve(), folder.resolve().parent)
    others = [path for each in {place, folder} for path in each.glob("*.csv") if path.name != source.name]
    if more:
        own = near and not others and not table.split_values and all(map(os.path.exists, images))
        images |= {path: [] for path in more if own}
        what = f"{plural(len(more), 'image')} of {folder} without a row in it, the first: {min(more)}"
        dropped.append(f"{source}: {what}; {'taken for images without objects' if own else 'not used'}")
    return dict(sorted(images.items()))


def _file(name: str, folder: Path) -> Path:
    path = folder / name
    if "\\" in name and not os.path.exists(path):
        path = folder / name.replace("\\", "/")
    if not os.path.exists(path) and os.path.isfile(folder / path.name):
        path = folder / path.name  # a path on the annotator's machine
    return path


def _size(path: Path, rows: Sequence[Row], source: Path, dropped: list[str]) -> tuple[int, int] | None:
    """Width and height by the rows, else by the image's header, else None."""
    said = {row.size for row in rows if row.size is not None}
    sizes = [(finite_number(width) or 0, finite_number(height) or 0) for width, height in sorted(said)]
    whole = [(int(w), int(h)) for w, h in sizes if w >= 1 and h >= 1 and w.is_integer() and h.is_integer()]
    if len(said) == len(whole) == 1:
        return whole[0]
    if said and any(any(size) for size in said):
        shown = few(f"{width}x{height}" for width, height in sorted(said))
        dropped.append(f"{source}: {path.name} has the sizes {shown}; that of the image file is taken")
    return size_as_stored(path, source, dropped)


def _refuse_shares(records: Sequence[Record], source: Path) -> None:
    boxes = [box for record in records for box in record.boxes.tolist()]
    if boxes and max(map(max, boxes)) <= 1:
        raise ValueError(f"{source}: all of its boxes lie in 0 to 1: shares of the image; expected pixels")
