"""The compiled kernels of engine and training, where the package was built with them, and the choice of what runs.

`kernels.cpp` is an optional extension of the package: pip compiles it where it finds a compiler. It is a plain C
library, loaded by ctypes. Without it layers are computed by torch, with the same results, slower.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

VERSION = 4
MAX_OUTPUTS = 8
LEVELS = {"portable": 0, "avx2": 1, "avx512": 2, "avx512vnni": 3}
VARIABLE = "HOYER_DET_KERNELS"
WITHOUT_KERNELS = (
    "the event-driven engine has no compiled kernels here: torch gives the same results, slower; "
    f"for them install a C++ compiler, then the package again ({VARIABLE}=torch: without this warning)"
)

_int64, _pointer = ctypes.c_int64, ctypes.c_void_p
_pointers = _pointer * MAX_OUTPUTS


def _fields(kind: type, names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, kind) for name in names.split())


def _structure(name: str, *fields: tuple[str, type]) -> type[ctypes.Structure]:
    """Return `struct NAME` of kernels.h, with its fields in its order."""
    return type(name, (ctypes.Structure,), {"_fields_": fields})


EventConv = _structure(
    "EventConv",
    *_fields(_int64, "images height width channels out_height out_width out_channels kernel_h kernel_w"),
    *_fields(_int64, "stride_h stride_w pad_h pad_w dilation_h dilation_w groups safe threads beside"),
    *_fields(_pointer, "packed dense"),
    ("wants_dense", _int64),
    ("input", _pointer),
    ("num_spikes", _int64),
    *_fields(_pointers, "threshold inverted spikes"),
    *_fields(_pointer, "scale bias residual real"),
    *_fields(_pointers, "level sign"),
)

EventStem = _structure(
    "EventStem",
    *_fields(_int64, "images height width channels out_height out_width out_channels kernel_h kernel_w"),
    *_fields(_int64, "stride_h stride_w pad_h pad_w pooled_height pooled_width pool_h pool_w pool_stride_h"),
    *_fields(_int64, "pool_stride_w pool_pad_h pool_pad_w threads"),
    *_fields(_pointer, "packed input factor mean std"),
    *_fields(ctypes.c_float, "step limit"),
    *_fields(_pointer, "scale bias more_scale more_bias real"),
    ("num_spikes", _int64),
    *_fields(_pointers, "level sign spikes"),
)

EventThreshold = _structure(
    "EventThreshold",
    ("x", _pointer),
    *_fields(_int64, "pixels channels"),
    *_fields(_pointer, "level sign spikes"),
    ("threads", _int64),
)

EventPool = _structure(
    "EventPool",
    ("x", _pointer),
    *_fields(_int64, "images height width words out_height out_width"),
    *_fields(_int64, "kernel_h kernel_w stride_h stride_w pad_h pad_w"),
    *_fields(_pointer, "inverted out"),
)

EventSum = _structure(
    "EventSum",
    *_fields(_int64, "images height width channels other_height other_width threads"),
    *_fields(_pointer, "input other sum"),
    ("num_spikes", _int64),
    *_fields(_pointers, "level sign spikes"),
)

EventHighest = _structure(
    "EventHighest", *_fields(_int64, "pixels words sets"), ("spikes", _pointers), ("out", _pointer)
)

EventStep = _structure("EventStep", ("kind", _int64), ("call", _pointer))

KINDS: tuple[type[ctypes.Structure], ...] = (EventConv, EventStem, EventThreshold, EventPool, EventSum, EventHighest)
"""Of an `EventStep`."""

EventResize = _structure(
    "EventResize",
    *_fields(_int64, "channels height width out_height out_width padded_height padded_width threads"),
    *_fields(_pointer, "input mean output"),
)

EventBoxes = _structure(
    "EventBoxes",
    *_fields(_int64, "number most"),
    *_fields(_pointer, "boxes order labels"),
    ("threshold", ctypes.c_double),
    ("kept", _pointer),
)

HoyerLayer = _structure(
    "HoyerLayer",
    *_fields(_int64, "number threads brief"),
    *_fields(_pointer, "parallel potential arriving output"),
    *_fields(ctypes.c_float, "v threshold low high q pull"),
    ("sums", ctypes.c_double * 2),
)


def set_pairs(call: EventConv | EventStem, **pairs: Sequence[int]) -> None:
    """Set the fields NAME_h and NAME_w of a call to a pair, height first."""
    for name, (height, width) in pairs.items():
        setattr(call, f"{name}_h", height)
        setattr(call, f"{name}_w", width)


def _load() -> ctypes.CDLL | None:
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_kernels{suffix}"
        if path.is_file():
            try:
                library = ctypes.CDLL(str(path))
                if library.events_version() == VERSION:
                    return _typed(library)
            except (OSError, AttributeError):  # of another machine, or cut off
                continue
    return None


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    layer = ctypes.POINTER(EventConv)
    library.events_use.argtypes = [ctypes.c_int]
    library.events_packed_bytes.argtypes, library.events_packed_bytes.restype = [layer], _int64
    library.events_pack.argtypes, library.events_pack.restype = [layer, _pointer, _pointer], None
    library.events_packed_dense_bytes.argtypes, library.events_packed_dense_bytes.restype = [layer], _int64
    library.events_pack_dense.argtypes, library.events_pack_dense.restype = [layer, _pointer, _pointer], None
    library.events_conv.argtypes = [layer]
    stem = ctypes.POINTER(EventStem)
    library.events_packed_stem_bytes.argtypes, library.events_packed_stem_bytes.restype = [stem], _int64
    library.events_pack_stem.argtypes, library.events_pack_stem.restype = [stem, _pointer, _pointer], None
    library.events_stem.argtypes = [stem]
    library.events_resize.argtypes = [ctypes.POINTER(EventResize)]
    library.events_run.argtypes = [ctypes.POINTER(EventStep), _int64, ctypes.POINTER(_int64)]
    library.events_suppress.argtypes, library.events_suppress.restype = [ctypes.POINTER(EventBoxes)], _int64
    library.events_hoyer.argtypes = [ctypes.POINTER(HoyerLayer), ctypes.c_int]
    library.events_threshold.argtypes = [_pointer, _int64, _int64, _pointer, _pointer, _pointer, _int64]
    library.events_threshold.restype = None
    library.events_pool.argtypes = [_pointer, *[_int64] * 12, _pointer, _pointer]
    library.events_pool.restype = None
    return library


def _find() -> tuple[str, ...]:
    found = [] if LIBRARY is None else [name for name, level in LEVELS.items() if LIBRARY.events_use(level) == level]
    return (*reversed(found), "torch")


LIBRARY = _load()
_available = _find()  # once: to ask is to choose, while threads may be computing
_current: str | None = None


def available() -> list[str]:
    """Return the kernels that run here, the fastest first; "torch", the reference, is always the last."""
    return list(_available)


def current() -> str:
    """Return the kernels in use: by the environment variable HOYER_DET_KERNELS, or the fastest that run here.

    Raises:
        ValueError: the variable names kernels that do not run here.
    """
    if _current is None:
        name = os.environ.get(VARIABLE) or _available[0]
        if LIBRARY is None and not os.environ.get(VARIABLE):
            warnings.warn(WITHOUT_KERNELS, stacklevel=2)
        try:
            choose(name)
        except ValueError as error:
            raise ValueError(f"{VARIABLE}: {error}") from None
    return _current


def choose(name: str) -> None:
    """Use these kernels from now on.

    Args:
        name: "avx512vnni", "avx512", "avx2", "portable" or "torch".

    Raises:
        ValueError: they do not run here.
    """
    global _current
    if name not in _available:
        raise ValueError(f"kernels {name!r} do not run here (allowed: {', '.join(_available)})")
    if name != "torch":
        LIBRARY.events_use(LEVELS[name])
    _current = name  # last: another thread goes by it


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use these kernels while open; see `choose`. For tests and measurements: layers pack their weights anew."""
    before = current()
    choose(name)
    try:
        yield
    finally:
        choose(before)
