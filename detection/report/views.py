"""Headline and sections of a run, and several runs side by side, as the templates are given them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from detection import curves
from detection.config import Recipe, flatten
from detection.records import EpochLog
from detection.report.energy import (
    certificate_section,
    certificate_verdict,
    layer_energy,
    networks_section,
    steps_table,
)
from detection.report.source import Source
from detection.report.words import format_energy, format_number, format_time, show_value
from detection.sections import Bar, Bars, Cell, Charts, Details, Section, Table, Words, percent
from detection.text import plural

UNKNOWN = ("not yet", "none", "unknown", "not checked")  # in the headline in place of a number
# Of spike layers; others have their own names.
QUANTITIES = {
    "extremum": "extremum E",
    "hoyer_per_layer": "H",
    "hoyer_share_of_potential": "regulariser's share of du",
    "hoyer_share_of_threshold": "regulariser's share of dv_th",
}


class Number(NamedTuple):
    """A number of the headline; `value` is None where it is not known, and `note` says why."""

    key: str
    label: str
    value: float | None
    shown: str
    note: str = ""


# A run


def describe(source: Source, name: str, key: str) -> dict[str, Any]:
    """Return everything that the page shows of one run.

    Args:
        source: the run.
        name: what the page calls it.
        key: begins the ids of its sections.
    """
    return {
        "key": key,
        "name": name,
        "task": source.task.name,
        "network": source.task.describe(),
        "data": source.task.describe_data(),
        "weights": source.weights,
        "epoch": source.line.epoch if source.line else None,
        "state": describe_state(source),
        "colour": "cold-0" if source.task.spiking else "warm-0",
        "headline": headline(source),
        "sections": sections(source),
    }


def describe_state(source: Source) -> str:
    """Say which weights the numbers belong to, and whether the training went to its end."""
    last, epochs = source.log[-1].epoch, source.run.config.train.epochs
    weights = {"last": "last", "best": "best", "ema": "averaged"}[source.weights]
    sentences = [f"Numbers of the {weights} weights, epoch {source.line.epoch} of {epochs}."] if source.line else []
    if last < epochs and source.run.config.train.patience and source.run.finished:
        sentences.append("The training ended early (train.patience).")
    elif last < epochs:
        sentences.append(f"The training has not gone to its end: {last} of {epochs} epochs are logged.")
    return " ".join(sentences)


def headline(source: Source) -> list[Number]:
    """Return the numbers at the top: metric, activity, energy against the twin, binarity, training time."""
    task, metrics = source.task, source.line.metrics if source.line else {}
    (main, label), *others = [(key, task.words.get(key, key)) for key in task.metrics]
    shown, note = "not yet", "No epoch has been evaluated yet."
    if main in metrics:
        shown = format_number(metrics[main])
        note = ", ".join(f"{words} {format_number(metrics[key])}" for key, words in others if key in metrics)
    numbers = [Number(main, label, metrics.get(main), shown, note)]
    activity, shown = metrics.get("activity"), "none"
    note = "There is no log of it." if task.spiking else "The network is analogue: ReLU in place of spikes."
    if activity is not None:
        shown, note = f"{100 * activity:.1f} %", "of the spiking neurons fire per image"
    numbers += [Number("activity", "Spike activity", activity, shown, note), *analysis_headline(source)]
    times = [line.total_seconds for line in source.log if line.total_seconds is not None]
    if not times:
        return [*numbers, Number("seconds", "Training time", None, "unknown", "There is no log of it.")]
    seconds, machine = sum(times), source.info.machine
    note = machine.gpu or f"{plural(machine.threads, 'thread')}, {machine.cpu}"
    return [*numbers, Number("seconds", "Training time", seconds, format_time(seconds), note)]


def analysis_headline(source: Source) -> list[Number]:
    """Return energy and certificate for the headline."""
    if source.analysis is None:
        why = source.missing["analysis"]
        unknown = Number("energy", "Energy", None, "unknown", why)
        return [unknown, Number("certificate", "Binarity", None, "not checked", why)]
    ratio = source.analysis["ratios"].get(f"{next(iter(source.analysis['networks']))}/twin") or {}
    energy = ratio.get("operations")
    if energy is not None:
        shown = f"{100 * energy:.1f} %"
        note = f"of the analogue twin's for operations; {100 * ratio['with_sram']:.0f} % with traffic to SRAM"
    else:
        energy = source.analysis["networks"]["twin"]["total_pj"]
        shown = format_energy(energy)
        note = "for the operations of an image; this network is the analogue twin itself"
    verdict, why = certificate_verdict(source.analysis)
    return [Number("energy", "Energy", energy, shown, note), Number("certificate", "Binarity", None, verdict, why)]


def sections(source: Source) -> list[Section]:
    """Return the sections of a run: those of its task stand behind the curves."""
    own = source.task.sections(source.line.evaluation if source.line else None, source.found)
    return [
        curves_section(source),
        *(section._replace(why=section.why or source.missing.get("evaluation", "")) for section in own),
        layers_section(source),
        *([steps_section(source)] if source.task.time_steps > 1 else []),
        networks_section(source),
        certificate_section(source),
        dynamics_section(source),
        recipe_section(source),
        origin_section(source),
    ]


def curves_section(source: Source) -> Section:
    """Return the last warning of each kind, the curves of the log, and the log in numbers."""
    task, log = source.task, source.log
    losses = dict.fromkeys(name for line in log for name in line.losses)
    columns = {"loss": [line.loss for line in log]}
    columns |= {name: [line.losses.get(name) for line in log] for name in losses}
    columns |= {name: [line.metrics.get(name) for line in log] for name in (*task.metrics, "activity")}
    columns |= {"seconds": [line.seconds for line in log]}
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    rows = [
        [Cell(str(line.epoch)), *map(number, values)]
        for line, values in zip(log, zip(*columns.values(), strict=True), strict=True)
    ]
    table = Table("Log", ("epoch", *columns), rows, sortable=False)
    charts = Charts(curves.draw_curves(log, task.metrics, task.score))
    said = {kind: (line.epoch, sentence) for line in log for kind, sentence in line.warnings.items()}
    warnings = [Words(f"Warning after epoch {epoch}: {sentence}.", "note") for epoch, sentence in said.values()]
    return Section("curves", "Curves", "Curves", [*warnings, charts, Details("The log in numbers", [table])])


def layers_section(source: Source) -> Section:
    """Return activity and energy of each layer."""
    rates = source.line.evaluation.activity_per_layer if source.line and source.line.evaluation else {}
    if rates:
        names, highest = curves.short_names(list(rates)), max(rates.values()) or 1.0
        bars = [(names[layer], [Bar(rate / highest)], [f"{100 * rate:.1f} %"]) for layer, rate in rates.items()]
        parts: list[Any] = [
            "Share of each spike layer's neurons that fire per image, in the order of the network.",
            Bars(bars),
            Details("Thresholds and regulariser of each layer in numbers", [layer_table(source.line, rates)]),
        ]
    elif source.task.spiking:
        parts = [Words("Left out. The log has no activity per layer.", "missing")]
    else:
        parts = ["The network is analogue: no layer spikes."]
    return Section("layers", "Layers", "Activity and energy per layer", parts + layer_energy(source))


def steps_section(source: Source) -> Section:
    """Return what a network of several time steps has found after each of them, and what it has cost until then."""
    logged = source.line.evaluation if source.line else None
    scores = {key: logged.after_steps(key) for key in source.task.headline} if logged else {}
    rows = source.analysis.get("steps", []) if source.analysis else []
    for key in source.task.headline:
        found = [row["metrics"][key] for row in rows if key in row["metrics"]]
        if len(found) > len(scores.get(key, [])):  # a log has the last step's alone
            scores[key] = found
    charts, missing = curves.draw_anytime(scores), source.missing.get("analysis", "")
    parts = ["The network of this run, stopped after fewer time steps than it was trained for."]
    parts += [Charts(charts)] if charts else []
    parts += (
        [steps_table(rows, scores)] if rows else [Words(f"The energy of each step is left out. {missing}", "missing")]
    )
    return Section("steps", "Time steps", "Time steps", parts)


def layer_table(line: EpochLog, rates: Mapping[str, float]) -> Table:
    """Return activity and what else is logged of each spike layer."""
    found = {QUANTITIES.get(name, name): values for name, values in line.layers.items()}
    found["|v_th| \N{MULTIPLICATION SIGN} E"] = curves.effective_thresholds(line)
    found = {name: values for name, values in found.items() if values}
    rows = [
        [layer, percent(rate), *(number(each.get(layer)) for each in found.values())] for layer, rate in rates.items()
    ]
    return Table("Spike layers", ("layer", "activity", *found), rows, code=True)


def dynamics_section(source: Source) -> Section:
    """Return what the spike layers did over the epochs, and their potentials around the threshold."""
    panels, histograms = curves.draw_dynamics(source.log), curves.draw_potentials(source.log)
    text = (
        "With z = u / |v_th| the membrane potential u in units of the trainable threshold, a neuron fires where "
        "z \N{GREATER-THAN OR EQUAL TO} E. A line per spike layer, coloured by depth from the first to the last."
    )
    explanation = (
        "The axis goes from \N{MINUS SIGN}1 to 3 times the effective threshold, the dashed line stands at 1: what is "
        "to its right fires. The first evaluation is grey, the last one blue; below each, the share of the neurons "
        "that lies between 1 and 3."
    )
    heading = Words("Membrane potentials around the threshold", "heading")
    parts: list[Any] = [] if source.task.spiking else ["The network is analogue: it has no thresholds."]
    if panels:
        parts = [text, Charts(panels), heading, explanation, Charts(histograms, small=True)]
    if panels and not histograms:
        parts[2:] = [Words("The log has no histograms of the potentials.", "note")]
    return Section("dynamics", "Thresholds", "Threshold dynamics", parts, "The log has no thresholds.")


def recipe_section(source: Source) -> Section:
    """Return what differs from the defaults, and the whole recipe."""
    parts: list[Any] = ["Every key has its default."]
    rows = changed_settings(source.run.config)
    if rows:
        table = Table("Recipe", ("key", "value", "default", "meaning"), rows, sortable=False, code=True)
        parts = ["What differs from the defaults; everything else is as --help has it.", table]
    whole = Words((source.run.folder / "config.yaml").read_text(encoding="utf-8"), "code", "config.yaml")
    return Section("recipe", "Recipe", "Recipe", [*parts, Details("The whole recipe, config.yaml", [whole])])


def changed_settings(config: Recipe) -> list[tuple[str, str, str, str]]:
    """Return the keys of a recipe whose values are not the defaults, with both values and the meaning of the key."""
    kind = type(config)
    defaults = flatten(kind.model_construct(data=kind.model_fields["data"].annotation.model_construct()))
    meaning = dict(_descriptions(kind))
    return [
        (key, show_value(value), show_value(defaults.get(key, "")), meaning.get(key, ""))
        for key, value in flatten(config).items()
        if value != defaults.get(key) and key != "data.classes"  # which the training fills in
    ]


def _descriptions(kind: type[BaseModel], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield key and description of every leaf of a recipe."""
    for name, info in kind.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _descriptions(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info.description or ""


def origin_section(source: Source) -> Section:
    """Return what it takes to make the run again: command, versions, machine, checksums."""
    info, again = source.info, compare_with_log(source)
    facts = [(name, str(value or "none")) for name, value in (info.versions | info.machine.model_dump()).items()]
    weights: Any = "The run has no weights and no checksums."
    logged, here = info.sha256, source.run.checksums()
    if logged or here:
        rows = [(name, logged.get(name) or here[name], _state(name, logged, here)) for name in sorted(logged | here)]
        weights = Table("Weights", ("file", "SHA-256", "state"), rows, sortable=False, code=True)
    parts = [
        *([again] if again else []),
        Words("Command", "heading"),
        Words(info.command, "code", "Command"),
        Words("Versions and machine", "heading"),
        Table("Versions and machine", ("what", "version or kind"), facts, sortable=False),
        Words("Weights", "heading"),
        weights,
    ]
    return Section("origin", "Reproduce", "How to reproduce it", parts)


def compare_with_log(source: Source) -> str | None:
    """Say whether the evaluation gave the logged numbers again; None without one."""
    if source.found is None or source.line is None:
        return None
    now, then = source.found.evaluation.metrics, source.line.metrics
    keys = [key for key in source.task.metrics if key in now and key in then]
    if all(now[key] == then[key] for key in keys):
        return f"Evaluated again for this page: {', '.join(keys)} equal to the log in every digit."
    parts = [f"{key} {now[key]:.4f} (log: {then[key]:.4f})" for key in keys]
    return f"Evaluated again for this page, not equal to the log: {', '.join(parts)}."


def _state(name: str, logged: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Say whether a weights file is in the folder, and the same as in run.json."""
    if name not in here:
        return "not in the folder"
    if name not in logged:
        return "not in run.json"
    return "in the folder, equal" if here[name] == logged[name] else "in the folder, but another file"


def number(value: float | None) -> Cell:
    """Return a number of any size with four digits; nothing for None."""
    return Cell("") if value is None else Cell(f"{value:.4g}", value)


# Several runs


def compare(sources: Sequence[Source], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return several runs side by side: the headline with gaps to the first run, curves on each other, settings."""
    task, names = sources[0].task, [run["name"] for run in runs]
    logged = [source.line.metrics if source.line else {} for source in sources]
    metrics = [key for key in task.metrics if any(key in line for line in logged)]
    rows = []
    for run, line in zip(runs, logged, strict=True):
        first = {} if run is runs[0] else logged[0]
        gaps = {key: line[key] - first[key] for key in metrics if key in line and key in first}
        cells = [{"key": key, "value": line.get(key), "gap": gaps.get(key)} for key in metrics]
        rows.append({"run": run, "metrics": cells, "numbers": {item.key: item for item in run["headline"]}})
    settings = [flatten(source.run.config) for source in sources]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    differences = [(key, *(show_value(setting.get(key, "")) for setting in settings)) for key in keys]
    differences = [row for row in differences if len(set(row[1:])) > 1]
    table = Table("Differences of the recipes", ("key", *names), differences, sortable=False, code=True)
    return {
        "metrics": [task.words.get(key, key) for key in metrics],
        "rows": rows,
        "charts": Charts(overlays(sources, names, metrics[:2])),
        "differences": table if differences else None,
    }


def overlays(sources: Sequence[Source], names: Sequence[str], metrics: Sequence[str]) -> list[Any]:
    """Return the curves of several runs on each other: metrics, loss, activity."""
    words = sources[0].task.words
    quantities: list[tuple[str, str, Any]] = [
        (words.get(key, key), "on the evaluation images", lambda line, key=key: curves.metric_of(line.evaluation, key))
        for key in metrics
    ]
    quantities.append(("Training loss", "mean over the epoch", lambda line: line.loss))
    quantities.append(("Spike activity", "neurons that fire, %", curves.activity_of))
    analogue = [name for name, source in zip(names, sources, strict=True) if not source.task.spiking]
    charts = []
    for title, label, value in quantities:
        runs = {name: curves.points_of(source.log, value) for name, source in zip(names, sources, strict=True)}
        options = {"may_be_logarithmic": title == "Training loss"}
        charts.append(curves.draw_overlay(title, label, runs, analogue, **options))
    return [chart for chart in charts if chart is not None]
