#!/usr/bin/env python3
"""Write every table of measured numbers from the logs: results/README.md, and marked parts of four other pages.

With --check nothing is written: the status is 1, and the files are named, if they say something else than the logs.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from backbones import zoo
from detection.cli.common import Parser, run_verb
from detection.config import FREE_KEYS, Recipe, flatten, recipe_kinds
from detection.records import EpochLog
from detection.runs import Run
from detection.tasks import task_of

HEADER = """# Real runs

Made from the logs by `python results/tables.py`. Metrics are those of the last epoch's weights, not of the best epoch.
The twin is the run of the same recipe with ReLU, the gap how far it is ahead, in points. Activity is the share of
spiking neurons that fire per image on the evaluation images; energy is that of all operations, at 45 nm, in units of
the twin's (`hoyer-det analyze`). Where several runs of one recipe stand in a folder, its README compares them; those
that differ from a base in one thing each are in [controlled_cifar10](controlled_cifar10/README.md) alone.

Every row can be trained again: `python results/again.py FOLDER` does so by the recipe in its folder, after the rows
that it has its first weights or its teacher from, and says whether the logs are equal in every digit (a command is that
of its day; its recipe may have changed since). Those of another processor or version are not: spikes near their
threshold differ, and the end does by a point or so. Where weights are kept, `hoyer-det evaluate WEIGHTS --data.root
FOLDER` measures them again: `zoo:NAME` (rounded, see below), or the run's own folder; of a file for the engine,
it is `hoyer-det benchmark FILE --data.root FOLDER`.
"""
CONTROLLED = "controlled_"  # begins the names of folders that have a page of their own, see controlled_runs.py
ZOO = """These networks come with the package: `detection.load("zoo:NAME")`, or `zoo:NAME` wherever a command takes a
run. Weights of convolutions and linear layers are stored in 16 or 8 bits, and measured so."""
DATA = {"scenes": "drawn scenes", "bccd": "BCCD", "coco128": "COCO128", "cifar10": "CIFAR-10 (JPEG)"}
DATA |= {"event_scenes": "made recordings", "VOCdevkit": "VOC07-320, internal split"}
DATA |= {"tinyimagenet32": "Tiny ImageNet at 32x32", "imagenette112": "Imagenette-112"}
# What README.md shows: one run of each kind.
BEST = (
    "demo_scenes_retinanet_resnet18_hoyer",
    "c1_bccd_retinanet_resnet18_hoyer",
    "c1_bccd_retinanet_resnet18_spiking_head",
    "bccd_thresholds/thresholds3",
    "c6_voc_retinanet_resnet18/spiking_taught",
    "c3_coco128_fasterrcnn_resnet18_hoyer",
    "c5_cifar10_vgg16/hoyer_150_epochs",
)
# Runs whose analogue counterpart has its own pretrained backbone, and an ordinary pyramid and head.
COUNTERPARTS = {
    f"c6_voc_retinanet_resnet18/{name}": "c6_voc_retinanet_resnet18/relu"
    for name in ("spikes", "membrane", "membrane_taught", "spiking_taught")
}
for name in ("spikes_imagenette", "thresholds3_imagenette"):
    COUNTERPARTS[f"c6_voc_retinanet_resnet18/{name}"] = "c6_voc_retinanet_resnet18/relu_imagenette"
COUNTERPARTS["c7_imagenette_resnet18/hoyer"] = "c7_imagenette_resnet18/relu"
for name in ("thresholds3", "continued"):
    COUNTERPARTS[f"c6_tinyimagenet_resnet18/widened/{name}"] = "c6_tinyimagenet_resnet18/widened/relu"
    COUNTERPARTS[f"c7_imagenette_resnet18/widened/{name}"] = "c7_imagenette_resnet18/widened/relu"
# These have their precision by its name, not "auto".
COUNTERPARTS |= dict.fromkeys(("c4_fast/bccd_norm", "c4_fast/bccd_norm_teacher"), "c4_fast/bccd_norm_relu")
COUNTERPARTS |= dict.fromkeys(("c4_fast/bccd_hoyer_again", "c4_fast/bccd_hoyer_teacher"), "c4_fast/bccd_relu")
for thresholds in (2, 3):
    COUNTERPARTS[f"bccd_thresholds/thresholds{thresholds}"] = "c4_fast/bccd_relu"
COUNTERPARTS |= {f"seeds/bccd/thresholds3_seed{seed}": f"seeds/bccd/relu_seed{seed}" for seed in (1, 2)}
COMPARED = "compare_cifar10"  # the comparison that README.md shows
# Keys that say nothing about an analogue network.
SPIKING_KEYS = (
    "hoyer.",
    "distillation.",
    "model.backbone.activation",
    "model.backbone.extremum",
    "model.backbone.momentum",
    "model.backbone.time_steps",
    "model.backbone.reset",
    "model.backbone.levels",
    "model.backbone.thresholds",
)
NETWORKS = {
    "vgg16": "VGG16",
    "resnet18": "ResNet18",
    "resnet50": "ResNet50",
    "retinanet": "RetinaNet",
    "retinanet_spiking": "RetinaNet, spiking neck and head",
    "retinanet_resnet18": "RetinaNet-ResNet18",
}
# The GPUs of docs/scaling.md, of which nothing was measured.
GPUS = (8, 64, 512)
SPEED = 1000  # of one, in units of the measured machine's
BATCHES = {"vgg16": 1024, "resnet18": 128, "resnet50": 64, "retinanet_resnet18": 16}  # images of one
MACHINE = 8  # of them in one machine
INSIDE, BETWEEN, LATENCY = (
    200e9,
    25e9,
    10e-6,
)  # bytes per second of one, in a machine and out of it; seconds of a message
BUCKET = 25 * 2**20  # bytes of gradients that torch sends together
BACKWARD = 2 / 3  # of a step


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Write the tables, or compare them."""
    parser = Parser(__doc__, prog)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="folder of run folders")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    folder = options.folder
    runs = read_runs(folder)
    files = {folder / "README.md": results_page(folder, runs)}
    readme = folder.parent / "README.md"
    if folder.name == "results" and readme.is_file():
        parts = {
            "measured": lambda: best_table(folder, runs),
            "speed": lambda: speed_tables(folder / "benchmarks"),
            "compared": lambda: compared_table(folder / COMPARED / "comparison.json"),
        }
        files[readme] = replace_parts(readme, parts)
    benchmarks = folder.parent / "benchmarks" / "README.md"
    if folder.name == "results" and benchmarks.is_file():
        files[benchmarks] = replace_parts(benchmarks, {"tables": lambda: benchmark_tables(folder / "benchmarks")})
    scaling = folder.parent / "docs" / "scaling.md"
    if folder.name == "results" and scaling.is_file():
        files[scaling] = replace_parts(scaling, {"projection": lambda: projection(folder / "benchmarks")})
    engine = folder.parent / "docs" / "engine.md"
    if folder.name == "results" and engine.is_file():
        files[engine] = replace_parts(engine, {"measured": lambda: engine_page(folder / "benchmarks")})
    different = [path for path, text in files.items() if not path.is_file() or path.read_text("utf-8") != text]
    if options.check:
        for path in different:
            print(f"{path}: says something else than the logs; python results/tables.py writes it", file=sys.stderr)
        if different:
            sys.exit(1)
        return
    for path in different:
        path.write_text(files[path], encoding="utf-8")
    print(f"{folder / 'README.md'}: {len(runs)} runs")


def read_runs(folder: Path) -> list[Run]:
    """Return the finished runs in `folder`; unfinished ones are named on standard error.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file of a run is damaged.
    """
    runs = []
    for path in sorted(folder.rglob("config.yaml")):
        if path.relative_to(folder).parts[0].startswith(CONTROLLED):
            continue
        run = Run.open(path.parent)
        if run.finished:
            runs.append(run)
        else:
            print(f"{run.folder}: not finished, left out", file=sys.stderr)
    if not runs:
        raise FileNotFoundError(f"{folder}: no finished run in it")
    return runs


# Rows of runs


def twin_of(run: Run, runs: Iterable[Run]) -> Run | None:
    """Return the analogue run of the same recipe, one in the same folder first; None for an analogue run."""
    if run.config.model.backbone.activation == "relu":
        return None
    for ours, theirs in COUNTERPARTS.items():
        if run.folder.as_posix().endswith(ours):
            return next((each for each in runs if each.folder.as_posix().endswith(theirs)), None)

    def key(config: Recipe) -> dict[str, Any]:
        values = flatten(config).items()
        return {key: value for key, value in values if not key.startswith(SPIKING_KEYS) and key not in FREE_KEYS}

    wanted = key(run.config)
    twins = [each for each in runs if each.config.model.backbone.activation == "relu" and key(each.config) == wanted]
    return min(twins, key=lambda twin: twin.folder.parent != run.folder.parent, default=None)


def energy_ratio(run: Run) -> str:
    """Return the energy of operations in units of the twin's, of the run's own analysis, or nothing."""
    path = run.folder / "analysis" / "analysis.json"
    if not path.is_file():
        return ""
    try:
        return f"{json.loads(path.read_text('utf-8'))['ratios']['spiking/twin']['operations']:.3f}"
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged, or no analysis ({error!r})") from None


def headline(run: Run) -> tuple[str, ...]:
    """Return the metrics of the run's task that stand in tables."""
    return task_of(run.config).headline


def last_line(run: Run) -> EpochLog:
    """Return the last line of a run's log.

    Raises:
        ValueError: it has no metrics.
    """
    line, metric = run.history()[-1], headline(run)[0]
    if metric not in line.metrics:
        raise ValueError(f"{run.folder / 'metrics.jsonl'}: its last line has no {metric}")
    return line


def minutes(run: Run) -> float:
    """Return how long training and evaluations took."""
    return sum(line.total_seconds or 0.0 for line in run.history()) / 60


def run_row(folder: Path, run: Run, runs: Sequence[Run]) -> list[str]:
    """Return one run as the cells of its table."""
    info, last = run.info(), last_line(run)
    if "last.safetensors" not in info.sha256:
        raise ValueError(f"{run.folder / 'run.json'}: has no SHA-256 of last.safetensors")
    first, second = headline(run)
    metrics, twin, theirs, ahead = last.metrics, twin_of(run, runs), "", ""
    if twin is not None:
        value = last_line(twin).metrics[first]
        theirs, ahead = link(folder, twin, f"{value:.4f}"), f"{100 * (value - metrics[first]):.1f}"
    machine = info.machine.gpu or f"{info.machine.threads} of {info.machine.cores} CPU cores"
    return [
        link(folder, run),
        data_name(run),
        task_of(run.config).describe(),
        str(last.epoch),
        f"{metrics[first]:.4f}",
        f"{metrics[second]:.4f}",
        theirs,
        ahead,
        f"{metrics['activity']:.4f}" if "activity" in metrics else "",
        energy_ratio(run),
        f"{minutes(run):.0f} on {machine}",
        f"`{info.command}`",
        kept_weights(folder, run),
        f"`{info.sha256['last.safetensors'][:16]}`",
    ]


def kept_weights(folder: Path, run: Run) -> str:
    """Return with what a run's row can be measured again: its folder, an entry of the zoo, a file, or nothing."""
    name = run.folder.relative_to(folder).as_posix()
    if (run.folder / "last.safetensors").is_file():
        return f"`results/{name}`"
    entries = (Run.open(f"{zoo.PREFIX}{entry}") for entry in zoo.names())
    found = [f"`{entry.address}`" for entry in entries if entry.info().trained_in == f"results/{name}"]
    file = run.folder / "export" / "model.events"
    return ", ".join([*found, *([f"`results/{name}/export/{file.name}`"] if file.is_file() else [])])


def link(folder: Path, run: Run, text: str | None = None) -> str:
    """Return a link to the run, by its name or `text`, for a page in `folder`."""
    name = run.folder.relative_to(folder).as_posix()
    return f"[{text or name}]({name}/)"


def data_name(run: Run) -> str:
    """Return the data set in words."""
    root = run.config.data.root.name
    return DATA.get(root, root)


def results_page(folder: Path, runs: Sequence[Run]) -> str:
    """Return the whole of results/README.md."""
    parts = [HEADER]
    for task in recipe_kinds():
        ours = [run for run in runs if run.config.task == task]
        rows = [run_row(folder, run, runs) for run in ours]
        if rows:
            first, second = headline(ours[0])
            names = ["run", "data", "network", "epochs", first, second, f"twin's {first}", "gap", "activity", "energy"]
            header = [*names, "minutes", "command", "weights", "their SHA-256"]
            parts.append(f"## {task.capitalize()}\n\n{markdown(header, rows)}")
    if rows := list(zoo_rows(folder)):
        header = ["name", "data", "network", "metric", "as stored", "as trained", "trained in", "MB", "SHA-256"]
        parts.append(f"## Zoo\n\n{ZOO}\n\n{markdown(header, rows)}")
    if rows := list(export_rows(folder)):
        header = ["run", "file", "metric", "file's", "run's", "difference in points"]
        words = "Accuracy of files by `hoyer-det export RUN ... --evaluate`, in ONNX Runtime or the engine."
        title = f"## Exported files\n\n{words}"
        parts.append(f"{title}\n\n{markdown(header, rows)}")
    return "\n".join(parts)


def zoo_rows(folder: Path) -> Iterable[list[str]]:
    """Yield a row for each entry of the zoo that was trained by one of these runs."""
    for name in zoo.names():
        run = Run.open(f"{zoo.PREFIX}{name}")
        info, (line,) = run.info(), run.history()
        trained = folder.parent / (info.trained_in or "none")
        if not trained.is_dir():
            continue
        metric, weights, source = headline(run)[0], run.folder / "last.safetensors", Run.open(trained)
        yield [
            f"`zoo:{name}`",
            data_name(run),
            task_of(run.config).describe(),
            metric,
            f"{line.metrics[metric]:.4f}",
            f"{last_line(source).metrics[metric]:.4f}",
            link(folder, source),
            f"{weights.stat().st_size / 1e6:.1f}",
            f"`{info.sha256[weights.name][:16]}`",
        ]


def export_rows(folder: Path) -> Iterable[list[str]]:
    """Yield a row for each exported file that was evaluated."""
    for path in sorted(folder.rglob("export/*.json")):
        described, run = json.loads(path.read_text("utf-8")), Run.open(path.parent.parent)
        metric = headline(run)[0]
        found, logged = (described["evaluation"][key][metric] for key in ("file", "run"))
        kind = "8 bits, analogue layers too" if described["analogue_int8"] else "8 bits where spikes come in"
        if described["format"] == "events":
            kind = "8 bits, event-driven engine"
        yield [
            link(folder, run),
            f"[{kind if described['int8'] else 'float'}]({path.relative_to(folder).as_posix()})",
            metric,
            f"{found:.4f}",
            f"{logged:.4f}",
            f"{100 * (found - logged):+.2f}",
        ]


def best_table(folder: Path, runs: Sequence[Run]) -> str:
    """Return README.md's table of what has been measured."""
    rows, found = [], {run.folder.relative_to(folder).as_posix(): run for run in runs}
    for name, run in ((name, found[name]) for name in BEST if name in found):
        metric, metrics, twin = headline(run)[0], last_line(run).metrics, twin_of(run, runs)
        rows.append(
            [
                f"[{data_name(run)}, {metric}](results/{name}/)",
                task_of(run.config).describe(),
                f"{metrics[metric]:.3f}",
                "" if twin is None else f"{last_line(twin).metrics[metric]:.3f}",
                f"{metrics['activity']:.1%}".replace("%", " %"),
                energy_ratio(run),
            ]
        )
    header = ["data, metric", "network", "spiking", "analogue twin", "neurons that fire", "energy / twin's"]
    return markdown(header, rows)


def compared_table(path: Path) -> str:
    """Return README.md's table of the variants of one recipe, by `hoyer-det compare`; nothing without its file."""
    if not path.is_file():
        return ""
    found = json.loads(path.read_text("utf-8"))

    def text(row: dict[str, Any], key: str, digits: int, unit: float = 1) -> str:
        return "" if row[key] is None else f"{row[key] / unit:.{digits}f}"

    columns = {"energy_uj": 2, "energy_sram_uj": 1, "energy_int8_uj": 2, "time_steps": 0, "training_seconds": 0}
    rows = [
        [
            row["variant"],
            f"{row[found['metric']]:.3f}",
            text(row, "activity", 1, 0.01),
            text(row, "synaptic_operations", 2, 1e6),
            *(text(row, key, digits) for key, digits in columns.items()),
        ]
        for row in found["variants"]
    ]
    header = ["variant", found["metric"], "neurons that fire, %", "synaptic operations, millions", "uJ, 32 bits"]
    return markdown([*header, "with SRAM", "uJ, 8 bits", "time steps", "training, s"], rows)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def replace_parts(path: Path, parts: dict[str, Callable[[], str]]) -> str:
    """Return the text of a file with each part between its two marks made anew.

    Raises:
        ValueError: a mark is missing.
    """
    text = path.read_text("utf-8")
    for name, make in parts.items():
        begin, end = f"<!-- {name}: made by results/tables.py -->\n", f"<!-- end of {name} -->\n"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{path}: needs the lines {begin.strip()!r} and {end.strip()!r} once")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}{make()}{end}{rest.partition(end)[2]}"
    return text


# Speed and memory


def read_benchmark(folder: Path, name: str) -> dict[str, Any]:
    """Return a benchmark's log, see benchmarks/common.py."""
    path = folder / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such log; python benchmarks/run_all.py {name} makes it")
    return json.loads(path.read_text("utf-8"))


def read_training(folder: Path) -> dict[str, Any]:
    """Return the log of training steps in float32, with the rows and ratios of that in bf16 behind its own."""
    found = read_benchmark(folder, "training")
    if (folder / "training_bf16.json").is_file():
        more = read_benchmark(folder, "training_bf16")
        found |= {key: found[key] + more[key] for key in ("rows", "ratios")}
    return found


def engine_table(folder: Path, threads: int) -> str:
    """Return how fast the event-driven engine is, in units of the faster one of the twin's 8-bit forms."""
    log = read_benchmark(folder, "event_engine")
    rows = [row for row in log["rows"] if row.get("threads") == threads]
    ratio = {(row["network"], row["form"]): row["times_best_twin_int8"] for row in rows}
    forms = [form for form in dict.fromkeys(row["form"] for row in rows) if form.startswith("events, ")]
    header = ["network", *(f"{form.removeprefix('events, ')} fire" for form in forms), "spiking, 8 bits, dense"]
    table = []
    for network in dict.fromkeys(row["network"] for row in rows if row["part"] == "networks"):
        values = (ratio.get((network, form)) for form in (*forms, "int8, ONNX Runtime"))
        table.append([NETWORKS[network], *("" if value is None else f"{value:.2f}" for value in values)])
    return markdown(header, table)


def trained_engine_table(folder: Path) -> str:
    """Return the same of trained networks on real images, with their accuracy beside that of their logs."""
    rows = [row for row in read_benchmark(folder, "event_engine")["rows"] if row["part"] == "trained"]
    table = []
    for row in rows:
        if row["form"] != "events":
            continue
        metric, value = next(iter(row["accuracy"]["file"].items()))
        logged = row["accuracy"]["run"][metric]
        table.append(
            [
                f"`{row['network']}`",
                str(row["threads"]),
                f"{row['activity']:.1%}".replace("%", " %"),
                f"{row['milliseconds']:.2f} ms",
                f"{row['times_best_twin_int8']:.2f}",
                f"{metric} {value:.4f} ({logged:.4f})",
            ]
        )
    header = ["network", "threads", "fire", "an image", "times the best 8-bit twin", "accuracy (logged)"]
    return markdown(header, table)


def dense_rule(folder: Path) -> str:
    """Return a table of single layers: their speed by events, and the activity above which a dense one is faster."""
    log = read_benchmark(folder, "event_engine")
    rows = [row for row in log["rows"] if row["part"] == "layers"]
    shown, table = (0.05, 0.1, 0.15, 0.2, 0.3), []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        speed = {row["density"]: row["gmacs"] for row in rows if row["layer"] == layer and "density" in row}
        dense = next(row["gmacs"] for row in rows if row["layer"] == layer and "form" in row)
        slower = [density for density, value in speed.items() if value < dense]
        bound = f"{min(slower):.0%}".replace("%", " %") if slower else "never"
        table.append([layer, *(f"{speed[density]:.0f}" for density in shown), f"{dense:.0f}", bound])
    header = [
        "layer",
        *(f"{density:.0%}".replace("%", " %") for density in shown),
        "dense, ONNX Runtime",
        "dense wins from",
    ]
    limit = log["limits"]
    largest = max(limit["dense_int8_gmacs"], *(row["gmacs"] for row in rows if "form" in row))
    return (
        f"{markdown(header, table)}\nThe largest dense 8-bit product that was measured gave "
        f"{largest:.0f} GMAC/s; memory was read at {limit['memory_gigabytes_per_second']:.0f} GB/s.\n"
    )


def engine_page(folder: Path) -> str:
    """Return the measured part of docs/engine.md."""
    log = read_benchmark(folder, "event_engine")
    versions, machine = log["packages"], log["machine"]
    return (
        f"On {machine['cores']} cores of {machine['cpu']} (kernels `{log['kernels']}`, ONNX Runtime "
        f"{versions['onnxruntime']}, OpenVINO {versions['openvino']}), one image at a time, in units of the faster of "
        f"the twin's two 8-bit forms. One thread:\n\n{engine_table(folder, 1)}\nTwo threads:\n\n"
        f"{engine_table(folder, 2)}\nTrained networks on real images, from the decoded image to boxes or logits; "
        "thresholds are set on 256 training images:\n\n"
        f"{trained_engine_table(folder)}\nSingle layers, one thread, GMAC/s of the dense layer:\n\n{dense_rule(folder)}"
    )


def trained_network(row: Mapping[str, Any]) -> str:
    """Return the network of a row of the benchmark of training, with its precision where that is not float32."""
    precision = row.get("precision", "float32")
    return NETWORKS[row["network"]] + (f" in {precision}" if precision != "float32" else "")


def speed_tables(folder: Path) -> str:
    """Return README.md's tables of inference and training, by the logs of three benchmarks."""
    inference, training = read_benchmark(folder, "inference"), read_training(folder)
    first = [row for row in inference["rows"] if (row["batch"], row["threads"]) == (1, 1)]
    ratios = {(trained_network(each), each["ours"], each["other"]): each for each in training["ratios"]}
    sizes = {trained_network(row): f"{row['batch']} images of {row['side']}x{row['side']}" for row in training["rows"]}
    trained = []
    for network, size in sizes.items():
        cells = [
            cell(ratios, (network, ours, other), key)
            for ours, other, key in (
                ("hoyer compiled", "twin compiled", "time"),
                ("hoyer compiled", "textbook eager", "time"),
                ("hoyer compiled", "twin eager", "memory"),
                ("hoyer low memory", "twin eager", "memory"),
            )
        ]
        trained.append([f"{network}, {size}", *cells])
    machine = training["machine"]["gpu"] or f"{training['machine']['cores']} CPU cores"
    header = [
        "a training step",
        "time, compiled / compiled twin's",
        "/ eager textbook's",
        "memory, compiled / eager twin's",
        "`train.low_memory` / eager twin's",
    ]
    return (
        "By events, in units of the faster 8-bit twin (ONNX Runtime or OpenVINO), one image, one thread:\n\n"
        f"{engine_table(folder, 1)}\n{trained_engine_table(folder)}\n"
        "Files for other programs, in units of the speed of the twin's ONNX file in float, batch 1, one thread:\n\n"
        f"{inference_table(first)}\n"
        f"Training on {machine}:\n\n{markdown(header, trained)}"
    )


def inference_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the speed of the files of each network, from rows of one size of batch and number of threads."""
    speed = {(row["network"], row["form"]): row for row in rows}
    forms = {
        "onnx int8": "spiking, 8 bits",
        "onnx int8, analogue too": "analogue layers in 8 bits, too",
        "onnx float": "spiking, float",
        "twin onnx int8": "twin, 8 bits",
    }
    return markdown(
        ["network", *forms.values()],
        [
            [NETWORKS[network], *(cell(speed, (network, form), "times_twin_onnx_float") for form in forms)]
            for network in dict.fromkeys(row["network"] for row in rows)
        ],
    )


def cell(rows: dict[Any, dict[str, Any]], place: Any, key: str) -> str:
    """Return a number of two digits after the point, or nothing where it was not measured."""
    return f"{rows[place][key]:.2f}" if place in rows else ""


def benchmark_tables(folder: Path) -> str:
    """Return the tables of benchmarks/README.md: all that five benchmarks have logged."""
    layer, scaling = read_benchmark(folder, "spike_layer"), read_benchmark(folder, "scaling")
    training, inference = read_training(folder), read_benchmark(folder, "inference")
    parts = ["### Spike layer, forward and backward\n"]
    parts.append(layer_tables(layer))
    parts.append("### Training step\n")
    rows = [
        [trained_network(each), each["ours"], each["other"], *(f"{each[key]:.2f}" for key in ("time", "memory"))]
        for each in training["ratios"]
    ]
    parts.append(markdown(["network", "way", "in units of", "time", "peak memory"], rows))
    for batch, threads in dict.fromkeys((row["batch"], row["threads"]) for row in inference["rows"]):
        here = [row for row in inference["rows"] if (row["batch"], row["threads"]) == (batch, threads)]
        parts.append(f"### Inference, batch {batch}, {threads} thread{'s' if threads > 1 else ''}\n")
        parts.append(f"Images per second in units of the twin's ONNX file in float.\n\n{inference_table(here)}")
    parts.append(f"### `hoyer-det predict` from file to file\n\n{predict_table(read_benchmark(folder, 'predict'))}")
    parts.append(f"### Growth of a training step\n\n{scaling_table(scaling['rows'])}")
    parts.append(f"### Exponents\n\n{exponents_table(scaling)}")
    parts.append(f"### Processes\n\n{processes_table(scaling['rows'])}")
    return "\n".join(parts)


def layer_tables(log: dict[str, Any]) -> str:
    """Return times of a spike layer in units of other layers', and of other packages' neurons."""
    own, packages = [], {}
    for each in log["ratios"]:
        neuron, _, how = each["other"].rpartition(" ")
        if neuron.startswith(("SpikingJelly", "snnTorch")):
            packages.setdefault((each["shape"], neuron), {})[how] = f"{each['time']:.2f}"
        else:
            own.append([each["shape"], each["ours"], each["other"], f"{each['time']:.2f}"])
    text = markdown(["potential", "time of", "in units of", "quotient"], own)
    if not packages:
        return text
    versions = ", ".join(f"{name} {version}" for name, version in log["peers"].items())
    rows = [[*place, found.get("compiled", ""), found.get("eager", "")] for place, found in packages.items()]
    header = ["potential", "neuron", "compiled / compiled", "eager / eager"]
    return (
        f"{text}\nOurs, which also computes the extremum and H and learns its threshold, in units of other packages' "
        f"neurons at one time step ({versions}):\n\n{markdown(header, rows)}"
    )


def predict_table(log: dict[str, Any]) -> str:
    """Return the parts of a prediction's time for each case, of this version and of an earlier one."""
    versions = {"before": log["before"], "now": log["rows"]}
    parts = dict.fromkeys(row["part"] for row in log["rows"])
    parts = sorted(parts, key=lambda part: part == "everything else")  # which comes last
    rows = []
    for case in dict.fromkeys(row["case"] for row in log["rows"]):
        for version, found in versions.items():
            here = {row["part"]: row for row in found if row["case"] == case}
            if here:
                times = {part: row["cpu_milliseconds"] for part, row in here.items()}
                cells = [f"{times[part]:.1f}" if part in times else "" for part in parts]
                speed = next(iter(here.values()))["images_per_second"]
                rows.append([f"{case}, {version}", *cells, f"{sum(times.values()):.1f}", f"{speed:.1f}"])
    return markdown(["", *parts, "all", "images/s"], rows)


def exponents_table(log: dict[str, Any]) -> str:
    """Return the fitted powers of time and memory, with the last point of each series."""
    rows = []
    for each in log["slopes"]:
        line = [row for row in log["rows"] if (row["series"], row["way"]) == (each["series"], each["way"])]
        last = f"{line[-1]['cpu_seconds']:.3g} s, {line[-1]['peak_bytes'] / 2**20:.0f} MiB"
        size = f"{each['series']}: {line[0]['value']:g} to {line[-1]['value']:g}"
        rows.append([size, each["way"], last, f"{each['time']:.2f}", f"{each['memory']:.2f}"])
    return markdown(["", "way", "at the end, processor time", "time", "memory"], rows)


def processes_table(measured: Sequence[dict[str, Any]]) -> str:
    """Return what a step costs a process that trains with another one."""
    found = {(row["way"], row["value"]): row for row in measured if row["series"] == "processes"}
    rows = []
    for way in dict.fromkeys(way for way, _ in found):
        one, two = found[way, 1], found[way, 2]
        times = [f"{two[key] / one[key]:.2f}" for key in ("cpu_seconds", "seconds")]
        rows.append([way, f"{two['all_reduces']:.0f}", f"{two['reduced_bytes'] / 1024:.1f} KiB", *times])
    header = ["shared by two", "all-reduces beside the gradients'", "their size"]
    return markdown([*header, "processor time of one / alone", "seconds / alone"], rows)


def all_reduce(size: float, number: int) -> float:
    """Return seconds in which `number` GPUs add up `size` bytes: a ring for the bytes, a tree for the latency."""
    return 2 * (number - 1) / number * size / bandwidth(number) + 2 * math.ceil(math.log2(number)) * LATENCY


def bandwidth(number: int) -> float:
    """Return bytes per second of the slowest link among `number` GPUs."""
    return INSIDE if number <= MACHINE else BETWEEN


def step_among(alone: float, network: dict[str, Any], number: int) -> tuple[float, float, float]:
    """Return seconds of a step among GPUs that share gradients, Hoyer's moments too, and BatchNorm's too.

    Args:
        alone: seconds of the step on one.
        network: of the log of benchmarks/scaling.py.
        number: of GPUs.
    """
    size = network["gradient_bytes"]
    buckets = math.ceil(size / BUCKET)
    sending = [all_reduce(size / buckets, number)] * buckets
    hidden = (
        BACKWARD * alone * (buckets - 1) / buckets
    )  # what is left of the backward pass when the first bucket is full
    gradients = alone + max(sending[-1], sum(sending) - hidden)
    moments = gradients + network["spike_layers"] * all_reduce(12, number)  # sums of c and of c^2, and the neurons
    size = 8 * network["batch_norm_channels"] / network["batch_norms"]  # two moments of a layer, in the mean
    gather = (number - 1) * size / bandwidth(number) + math.ceil(math.log2(number)) * LATENCY
    return gradients, moments, moments + network["batch_norms"] * (gather + all_reduce(size, number))


def projection(folder: Path) -> str:
    """Return the assumptions and the table of docs/scaling.md."""
    training, scaling = read_benchmark(folder, "training"), read_benchmark(folder, "scaling")
    measured = {row["network"]: row for row in training["rows"] if row["way"] == "hoyer compiled"}
    rows = []
    for network in scaling["networks"]:
        name, row = network["network"], measured[network["network"]]
        alone = row["seconds"] / row["batch"] * BATCHES[name] / SPEED
        shares = [" / ".join(f"{alone / each:.2f}" for each in step_among(alone, network, number)) for number in GPUS]
        layers = f"{network['spike_layers']}, {network['batch_norms']}"
        size = f"{network['gradient_bytes'] / 1e6:.0f} MB"
        rows.append([NETWORKS[name], f"{BATCHES[name]}", f"{1e3 * alone:.1f} ms", size, layers, *shares])
    header = ["network", "images per GPU", "step alone", "gradients", "spike layers, BatchNorms"]
    header += [f"{number} GPUs" for number in GPUS]
    machine = f"{training['machine']['cores']} cores of {training['machine']['cpu']}"
    return (
        f"Measured: seconds per image of a compiled step on {machine}; bytes and layers. Assumed, not measured: a GPU "
        f"{SPEED} times as fast as these cores; {INSIDE / 1e9:g} GB/s between the {MACHINE} of a machine, "
        f"{BETWEEN / 1e9:g} GB/s for each of more; {1e6 * LATENCY:g} microseconds of latency; "
        f"{BUCKET / 2**20:g} MiB per bucket; a backward pass of {BACKWARD:.2f} of a step.\n\n{markdown(header, rows)}"
    )


def scaling_table(measured: Sequence[dict[str, Any]]) -> str:
    """Return processor time and memory of both kinds of Hoyer network in units of the twin's, for each size."""
    rows = []
    for series, value in dict.fromkeys((row["series"], row["value"]) for row in measured if row["way"] == "twin"):
        ways = {row["way"]: row for row in measured if (row["series"], row["value"]) == (series, value)}
        quotients = [
            f"{ways[way][key] / ways['twin'][key]:.2f}" if way in ways else ""
            for way in ("hoyer", "hoyer low memory")
            for key in ("cpu_seconds", "peak_bytes")
        ]
        size = f"{ways['twin']['cpu_seconds']:.3f} s, {ways['twin']['peak_bytes'] / 2**20:.0f} MiB"
        rows.append([f"{series} {value:g}", size, *quotients])
    header = ["", "twin, processor time", "Hoyer, time / twin's", "memory", "low memory, time", "memory"]
    return markdown(header, rows)


if __name__ == "__main__":
    run_verb(main)
