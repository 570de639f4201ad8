"""What the template is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel
from torch import Tensor

from detection.config import Recipe, flatten
from detection.evaluation import PrecisionRecall, average_precision
from detection.report.charts import Chart, Line, Points, draw_chart
from detection.report.source import Source
from detection.report.words import (
    METRICS,
    NAMES,
    describe_data,
    describe_network,
    format_energy,
    format_number,
    format_time,
    plural,
    short_names,
    show_value,
)

UNKNOWN = ("not yet", "none", "unknown", "not checked")  # what stands in the headline where there is no number


LayerValues = Callable[[Mapping[str, Any]], Mapping[str, float] | None]  # of a line of the log, by layer


def histograms(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per layer the membrane potentials around the threshold in the first and in the last evaluation, as outlines.

    A picture is 160 x 74 units; the axis goes from -1 to 3 times the effective threshold.
    """
    found = [(line["epoch"], line["potentials"]) for line in log if line.get("potentials")]
    if not found:
        return []
    pictures = []
    for layer, name in short_names(found[-1][1]).items():
        epochs = [(epoch, shares[layer]) for epoch, shares in found if layer in shares]
        epochs = epochs if len(epochs) == 1 else [epochs[0], epochs[-1]]
        highest = max(max(shares) for _, shares in epochs) or 1.0
        outlines = []
        for _, shares in epochs:
            step = 160 / len(shares)
            tops = [f"V{62 - 58 * share / highest:.1f}H{step * (index + 1):.1f}" for index, share in enumerate(shares)]
            outlines.append("M0 62" + "".join(tops) + "V62")
        firing = [100 * sum(shares[len(shares) // 2 :]) for _, shares in epochs]
        change = " \N{RIGHTWARDS ARROW} ".join(f"{value:.1f}" for value in firing)
        pictures.append(
            {
                "name": name,
                "outlines": outlines,
                "epochs": [epoch for epoch, _ in epochs],
                "note": f"{change} %",
            }
        )
    return pictures


def describe(source: Source, name: str, key: str) -> dict[str, Any]:
    """Everything that the page shows of one run.

    Args:
        source: the run.
        name: what the page calls it.
        key: start of the ids of its sections.
    """
    config, log, line, analysis, evaluation = (
        source.run.config,
        source.log,
        source.line,
        source.analysis,
        source.evaluation,
    )
    spiking = config.model.backbone.activation != "relu"
    return {
        "key": key,
        "name": name,
        "folder": source.run.address,
        "task": config.task,
        "network": describe_network(config),
        "data": describe_data(config),
        "which": source.which,
        "epoch": line["epoch"] if line else None,
        "state": describe_state(source),
        "spiking": spiking,
        "missing": source.missing,
        "headline": headline(source),
        "recipe": changed_settings(config),
        "config_file": (source.run.folder / "config.yaml").read_text(encoding="utf-8"),
        "curves": [chart for chart in curves(log, config.task) if chart],
        "log": log_table(log, config.task),
        "classes": class_table(line) if line and "per_class" in line else None,
        "precision_recall": precision_recall_view(evaluation.curves) if evaluation and evaluation.curves else None,
        "confusion": confusion_view(evaluation.confusion, config.data.classes)
        if evaluation and evaluation.confusion is not None
        else None,
        "activity": activity_rows(line) if line and line.get("activity_per_layer") else None,
        "analysis": analysis_view(analysis) if analysis else None,
        "dynamics": [chart for chart in dynamics(log) if chart],
        "histograms": histograms(log),
        "pictures": {
            "Best": evaluation.pictures[: evaluation.num_best],
            "Worst": evaluation.pictures[evaluation.num_best :],
        }
        if evaluation and evaluation.pictures
        else None,
        "again": compare_with_log(source),
        "info": source.info,
        "weights": weights_view(source),
    }


def run_styles(sources: Sequence[Source]) -> list[str]:
    """Colour and dashes per run: cold colours for spiking networks, warm ones for analogue ones."""
    taken = {"cold": 0, "warm": 0}
    styles = []
    for source in sources:
        kind = "warm" if source.run.config.model.backbone.activation == "relu" else "cold"
        styles.append(f"{kind}-{taken[kind] % 4} dash-{taken[kind] % 4}")
        taken[kind] += 1
    return styles


def describe_state(source: Source) -> str:
    """Which weights the numbers belong to, and whether the training went to its end."""
    last, epochs = source.log[-1]["epoch"], source.run.config.train.epochs
    weights = {"last": "last", "best": "best", "ema": "averaged"}[source.which]
    sentences = [f"Numbers of the {weights} weights, epoch {source.line['epoch']} of {epochs}."] if source.line else []
    if last < epochs:
        sentences.append(f"The training has not gone to its end: {last} of {epochs} epochs are logged.")
    return " ".join(sentences)


def headline(source: Source) -> list[dict[str, Any]]:
    """The numbers at the top: metric, activity, energy against the twin, certificate, time. All come from the log or
    the analysis; what is not known has None for a value and a note that says why.
    """
    task, line, analysis = source.run.config.task, source.line, source.analysis
    spiking = source.run.config.model.backbone.activation != "relu"
    main, *others = METRICS[task]
    numbers = []
    if line:
        rest = ", ".join(f"{NAMES.get(key, key)} {format_number(line[key])}" for key in others if key in line)
        numbers.append(
            {
                "key": main,
                "label": NAMES.get(main, main),
                "value": line[main],
                "shown": format_number(line[main]),
                "note": rest,
            }
        )
    else:
        note = "No epoch has been evaluated yet."
        numbers.append({"key": main, "label": NAMES.get(main, main), "value": None, "shown": "not yet", "note": note})
    activity = line.get("activity") if line else None
    if activity is not None:
        numbers.append(
            {
                "key": "activity",
                "label": "Spike activity",
                "value": activity,
                "shown": f"{100 * activity:.1f} %",
                "note": "of the spiking neurons fire per image",
            }
        )
    else:
        note = "There is no log of it." if spiking else "The network is analogue: ReLU in place of spikes."
        numbers.append({"key": "activity", "label": "Spike activity", "value": None, "shown": "none", "note": note})
    numbers += analysis_headline(source, analysis, spiking)
    time = {"key": "seconds", "label": "Training time", "value": None, "shown": "unknown", "note": ""}
    if any("seconds" in row for row in source.log):
        seconds = sum(row.get("seconds", 0.0) + row.get("eval_seconds", 0.0) for row in source.log)
        machine = source.info.get("machine", {})
        threads, cpu = plural(machine.get("threads", 0), "thread"), machine.get("cpu", "unknown CPU")
        time |= {"value": seconds, "shown": format_time(seconds), "note": machine.get("gpu") or f"{threads}, {cpu}"}
    else:
        time["note"] = "There is no log of it."
    return [*numbers, time]


def analysis_headline(source: Source, analysis: dict[str, Any] | None, spiking: bool) -> list[dict[str, Any]]:
    """Energy and certificate for the headline."""
    energy = {"key": "energy", "label": "Energy", "value": None, "shown": "unknown", "note": ""}
    certificate = {"key": "certificate", "label": "Binarity", "value": None, "shown": "not checked", "note": ""}
    if analysis is None:
        energy["note"] = certificate["note"] = source.missing["analysis"]
        return [energy, certificate]
    ratio = analysis["ratios"].get("spiking/twin")
    if ratio is not None and ratio["operations"] is not None:
        energy |= {"value": ratio["operations"], "shown": f"{100 * ratio['operations']:.1f} %"}
        energy["note"] = f"of the analogue twin's for operations; {100 * ratio['with_sram']:.0f} % with traffic to SRAM"
    else:
        twin = analysis["networks"]["twin"]["total_pj"]
        energy |= {"value": twin, "shown": format_energy(twin)}
        energy["note"] = "for the operations of an image; this network is the analogue twin itself"
    verdict, note = certificate_verdict(analysis)
    return [energy, certificate | {"shown": verdict, "note": note}]


def certificate_verdict(analysis: Mapping[str, Any]) -> tuple[str, str]:
    """A word or two, and a sentence with what is behind them."""
    certificate = analysis["certificate"]
    if "spiking" not in analysis["networks"]:
        return "analogue", "It has no spike layer."
    if certificate["violations"]:
        number = len(certificate["violations"])
        return "not binary", f"{plural(number, 'layer sees', 'layers see')} other values than 0 and 1."
    layers, exceptions = plural(certificate["num_binary"], "layer"), len(certificate["exceptions"])
    if exceptions <= 1:  # the stem, which is always allowed to see pixels
        return "binary", f"{layers}, all but the first, which sees pixels, saw 0 and 1 only."
    return f"binary, {exceptions} exceptions", f"{layers} saw 0 and 1 only; {exceptions} are real-valued by design."


def analysis_view(analysis: Mapping[str, Any]) -> dict[str, Any]:
    """Networks side by side, layers with their energy, and the certificate, in an analysis as it is stored."""
    networks = analysis["networks"]
    most = max(network["total_sram_pj"] for network in networks.values()) or 1.0
    own = "spiking" if "spiking" in networks else "twin"
    rows = [
        dict(network)
        | {
            "name": NAMES[name],
            "style": "warm-0" if "twin" in name else "quiet" if name == "binary" else "cold-0",
            "operations_share": network["total_pj"] / most,
            "memory_share": network["memory_sram_pj"] / most,
            "to_first": network["total_pj"] / networks[own]["total_pj"] if networks[own]["total_pj"] else None,
        }
        for name, network in networks.items()
    ]
    layers = analysis["layers"]
    names = short_names(layer["name"] for layer in layers)
    highest = max((energy for layer in layers for energy in layer["energy_pj"].values()), default=0.0) or 1.0
    return {
        "num_images": analysis["num_images"],
        "costs": analysis["costs"],
        "networks": rows,
        "own": NAMES[own],
        "layers": [
            dict(layer)
            | {
                "name": names[layer["name"]],
                "bars": [
                    {
                        "name": NAMES[key],
                        "style": style,
                        "energy": layer["energy_pj"][key],
                        "share": layer["energy_pj"][key] / highest,
                    }
                    for key, style in (("spiking", "cold-0"), ("twin", "warm-0"))
                    if key in layer["energy_pj"]
                ],
            }
            for layer in layers
        ],
        "first_layer": analysis["first_layer"],
        "certificate": dict(analysis["certificate"])
        | dict(zip(("verdict", "note"), certificate_verdict(analysis), strict=True)),
    }


def changed_settings(config: Recipe) -> list[dict[str, str]]:
    """The keys of a recipe whose values are not the defaults, with both values and what the key means."""
    kind = type(config)
    defaults = flatten(kind.model_construct(data=kind.model_fields["data"].annotation.model_construct()))
    meaning = dict(_descriptions(kind))
    return [
        {"key": key, "value": show_value(value), "default": show_value(defaults[key]), "meaning": meaning[key]}
        for key, value in flatten(config).items()
        if value != defaults[key] and key != "data.classes"  # which the training fills in
    ]


def _descriptions(kind: type[BaseModel], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Key and description of every leaf of a recipe."""
    for name, info in kind.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _descriptions(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info.description or ""


def curves(log: Sequence[Mapping[str, Any]], task: str) -> list[Chart | None]:
    """Losses, metric, activity, thresholds, learning rate and speed over the epochs."""
    terms = [key for key in dict.fromkeys(key for line in log for key in line) if key.startswith("loss/")]
    losses = [Line("total", points_of(log, "loss"), "strong")]
    losses += [
        Line(key.removeprefix("loss/"), points_of(log, key), f"tone-{index % 8}") for index, key in enumerate(terms)
    ]
    keys = METRICS[task]
    metrics = [Line(key, points_of(log, key), f"tone-{index}") for index, key in enumerate(keys)]
    averaged = [{"epoch": line["epoch"]} | line["ema"] for line in log if line.get("ema")]
    metrics += [Line(f"{keys[0]}, averaged weights", points_of(averaged, keys[0]), "tone-3 dash-1")] if averaged else []
    activity = layer_lines(log, lambda line: line.get("activity_per_layer"), scale=100)
    activity.append(Line("whole network", [(x, 100 * y) for x, y in points_of(log, "activity")], "strong"))
    return [
        draw_chart("Training loss", losses, "mean over the epoch", may_be_logarithmic=True),
        draw_chart("Accuracy" if task == "classification" else "Average precision", metrics, "share, 0 to 1"),
        draw_chart("Spike activity", activity, "neurons that fire, %"),
        draw_chart("Effective threshold", layer_lines(log, effective_threshold), "|v_th| \N{MULTIPLICATION SIGN} E"),
        draw_chart("Learning rate", [Line("learning rate", points_of(log, "lr"))], "at the beginning of the epoch"),
        draw_chart(
            "Training speed", [Line("images per second", points_of(log, "images_per_second"))], "images per second"
        ),
    ]


def dynamics(log: Sequence[Mapping[str, Any]]) -> list[Chart | None]:
    """Threshold, extremum and regulariser of each spike layer over the epochs."""
    return [
        draw_chart("Threshold v_th", layer_lines(log, lambda line: line.get("v_th")), "v_th, membrane potential"),
        draw_chart("Hoyer extremum E", layer_lines(log, lambda line: line.get("extremum")), "E, 0 to 1"),
        draw_chart(
            "Hoyer regulariser H", layer_lines(log, lambda line: line.get("hoyer_per_layer")), "H, epoch's mean"
        ),
    ]


def points_of(log: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(epoch, value) of a key where a line has it; -1 stands for undefined and is left out."""
    return [(line["epoch"], float(line[key])) for line in log if line.get(key) is not None and line[key] != -1]


def effective_threshold(line: Mapping[str, Any]) -> dict[str, float]:
    """|v_th| * E per layer, that is the membrane potential from which on it fires."""
    extremum = line.get("extremum") or {}
    return {name: abs(value) * extremum[name] for name, value in (line.get("v_th") or {}).items() if name in extremum}


def layer_lines(log: Sequence[Mapping[str, Any]], of: LayerValues, scale: float = 1.0) -> list[Line]:
    """A line per layer of what `of` gives for each line of the log, in the order of the network."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in log:
        for name, value in (of(line) or {}).items():
            found.setdefault(name, []).append((line["epoch"], scale * value))
    last = max(1, len(found) - 1)
    return [
        Line(name, found[layer], depth=index / last) for index, (layer, name) in enumerate(short_names(found).items())
    ]


def log_table(log: Sequence[Mapping[str, Any]], task: str) -> dict[str, Any]:
    """The scalars of the log, a row per epoch."""
    terms = [key for key in dict.fromkeys(key for line in log for key in line) if key.startswith("loss/")]
    keys = ["loss", *terms, *METRICS[task], "activity", "seconds"]
    keys = [key for key in keys if any(line.get(key) is not None for line in log)]
    rows = [[line["epoch"], *(line.get(key) for key in keys)] for line in log]
    return {"columns": ["epoch", *(key.removeprefix("loss/") for key in keys)], "rows": rows}


def class_table(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """AP per class, the highest first, classes without boxes at the end."""
    rows = [{"name": name} | dict(values) for name, values in line["per_class"].items()]
    return sorted(rows, key=lambda row: -row["AP"])


def precision_recall_view(found: Mapping[str, PrecisionRecall]) -> dict[str, Any] | None:
    """A chart of precision over recall and a table; of more than eight classes the four best and worst have colours."""
    with_boxes = {name: curve for name, curve in found.items() if curve.num_boxes}
    values = {name: average_precision(curve, "area") for name, curve in with_boxes.items()}
    order = sorted(values, key=lambda name: -values[name])
    coloured = order if len(order) <= 8 else order[:4] + order[-4:]
    lines = [Line(name, _outline(with_boxes[name]), "quiet") for name in order if name not in coloured]
    lines += [
        Line(f"{name} {values[name]:.3f}", _outline(with_boxes[name]), f"tone-{index}")
        for index, name in enumerate(coloured)
    ]
    rows = [
        {
            "name": name,
            "AP": values[name],
            "num_boxes": with_boxes[name].num_boxes,
            "num_detections": len(with_boxes[name].scores),
            "recall": float(with_boxes[name].recall[-1]) if len(with_boxes[name].scores) else 0.0,
        }
        for name in order
    ]
    chart = draw_chart("Classes", lines, "precision, highest from here on", "recall", limits=(0.0, 1.0))
    return {"chart": chart, "rows": rows, "num_quiet": len(order) - len(coloured)} if chart else None


def _outline(curve: PrecisionRecall) -> Points:
    """The corners of precision (highest at this recall or above) over recall, down to 0 where the recall ends."""
    if not len(curve.scores):
        return [(0.0, 0.0)]
    recall, precision = curve.recall, curve.envelope
    corners = [(0.0, float(precision[0]))]
    for index in np.flatnonzero(np.diff(precision) != 0).tolist():  # the last point before each fall
        corners += [
            (float(recall[index]), float(precision[index])),
            (float(recall[index]), float(precision[index + 1])),
        ]
    return [*corners, (float(recall[-1]), float(precision[-1])), (float(recall[-1]), 0.0)]


def confusion_view(confusion: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Share of right answers per class, the lowest first, and the ten most frequent mistakes."""
    totals = confusion.sum(1)
    rows = [
        {"name": name, "share": float(confusion[index, index]) / int(totals[index]), "num_images": int(totals[index])}
        for index, name in enumerate(class_names)
        if totals[index]
    ]
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    pairs = []
    for place in wrong.argsort(descending=True, stable=True)[:10].tolist():
        truth, answer = divmod(place, len(class_names))
        if wrong[place]:
            pairs.append(
                {
                    "truth": class_names[truth],
                    "answer": class_names[answer],
                    "num": int(wrong[place]),
                    "share": int(wrong[place]) / int(totals[truth]),
                }
            )
    return {"rows": sorted(rows, key=lambda row: row["share"]), "pairs": pairs}


def activity_rows(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Activity, v_th, extremum, effective threshold and H of each spike layer."""
    rates = line["activity_per_layer"]
    thresholds = effective_threshold(line)
    highest = max(rates.values()) or 1.0
    return [
        {
            "name": name,
            "layer": layer,
            "activity": rates[layer],
            "share": rates[layer] / highest,
            "v_th": (line.get("v_th") or {}).get(layer),
            "extremum": (line.get("extremum") or {}).get(layer),
            "threshold": thresholds.get(layer),
            "H": (line.get("hoyer_per_layer") or {}).get(layer),
        }
        for layer, name in short_names(rates).items()
    ]


def compare_with_log(source: Source) -> str | None:
    """A sentence that says whether the evaluation gave the logged numbers again; None without one."""
    if source.evaluation is None or source.line is None:
        return None
    keys = [key for key in METRICS[source.run.config.task] if key in source.evaluation.metrics]
    now, then = source.evaluation.metrics, source.line
    if all(now[key] == then[key] for key in keys):
        return f"Evaluated again for this page: {', '.join(keys)} equal to the log in every digit."
    parts = [f"{key} {now[key]:.4f} (log: {then[key]:.4f})" for key in keys]
    return f"Evaluated again for this page, not equal to the log: {', '.join(parts)}."


def weights_view(source: Source) -> list[dict[str, str]]:
    """SHA-256 of each weights file, and whether the file is here and the same."""
    logged, here = source.info.get("sha256", {}), source.run.checksums()
    rows = []
    for name in sorted(logged.keys() | here.keys()):
        if name not in here:
            state = "not in the folder"
        elif name not in logged:
            state = "not in run.json"
        else:
            state = "in the folder, equal" if here[name] == logged[name] else "in the folder, but another file"
        rows.append({"name": name, "sha256": logged.get(name) or here[name], "state": state})
    return rows


def compare(sources: Sequence[Source], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs side by side: the headline with gaps to the first run, curves on top of each other, settings."""
    task = sources[0].run.config.task
    metrics = [key for key in METRICS[task] if any(source.line and key in source.line for source in sources)]
    rows = []
    for source, run in zip(sources, runs, strict=True):
        cells = []
        for key in metrics:
            value = source.line.get(key) if source.line else None
            first = sources[0].line.get(key) if sources[0].line else None
            gap = None if value is None or first is None or source is sources[0] else value - first
            cells.append({"key": key, "value": value, "gap": gap})
        numbers = {number["key"]: number for number in run["headline"]}
        rows.append({"run": run, "metrics": cells, "numbers": numbers, "epoch": run["epoch"]})
    charts = []
    for title, key, scale, label in [
        *((NAMES.get(key, key), key, 1, "share, 0 to 1") for key in metrics[:2]),
        ("Training loss", "loss", 1, "mean over the epoch"),
        ("Spike activity", "activity", 100, "neurons that fire, %"),
    ]:
        lines = [
            Line(run["name"], [(x, scale * y) for x, y in points_of(source.log, key)], run["style"])
            for source, run in zip(sources, runs, strict=True)
        ]
        charts.append(draw_chart(title, lines, label, may_be_logarithmic=key == "loss"))
    settings = [flatten(source.run.config) for source in sources]
    differences = [
        {"key": key, "values": [show_value(setting[key]) for setting in settings]}
        for key in settings[0]
        if any(setting[key] != settings[0][key] for setting in settings)
    ]
    return {
        "metrics": [NAMES.get(key, key) for key in metrics],
        "rows": rows,
        "charts": [chart for chart in charts if chart],
        "differences": differences,
    }
