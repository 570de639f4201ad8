"""Variants of a recipe beside each other: accuracy, energy, activity, and the price of their training.

Accuracy and spike activity are those of the last epoch's log. Energy, operations, time steps and parameters come from
an analysis of the last weights, see `detection.analysis`, over so many evaluation images in equal distances. It stays
in the run's folder, so that it is made once. Energy is in uJ per image, of all operations, also with all weights and
activations read from and written to SRAM; with 32-bit and, where it is priced, with 8-bit numbers. Synaptic operations
are pairs of an input that is not 0 and an output that it reaches, over all time steps. Seconds are those of the
training steps of all epochs. Memory is `EpochLog.memory_mib`, the highest.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from backbones import HOROWITZ_45NM
from detection.analysis import MILLION, analyze_run
from detection.config import Recipe
from detection.curves import draw_comparison, draw_trade_off
from detection.figures import save_png
from detection.files import write_csv, write_whole
from detection.records import DataFingerprint
from detection.runs import Run
from detection.tasks import task_of
from detection.tasks.evaluate import evaluation_data
from detection.text import plural, printable, say, spread

FILES = ("README.md", "comparison.json", "comparison.csv", "ablation.png", "energy.png")
ENERGIES = {  # key of a row: heading, quantity of `NetworkEnergy`, whether with 8-bit numbers
    "energy_uj": ("uJ, 32 bits", "total_pj", False),
    "energy_sram_uj": ("with SRAM", "total_sram_pj", False),
    "energy_int8_uj": ("uJ, 8 bits", "total_pj", True),
    "energy_int8_sram_uj": ("8 bits, with SRAM", "total_sram_pj", True),
}
COSTS = {  # key of a row: heading, unit, digits
    "time_steps": ("time steps", 1, 0),
    "synaptic_operations": ("synaptic operations, millions", MILLION, 2),
    "twin_macs": ("MAC of the twin, millions", MILLION, 2),
    "parameters": ("parameters, millions", MILLION, 3),
    "training_seconds": ("training, s", 1, 0),
    "memory_mib": ("memory, MiB", 1, 0),
}
TEXT = """Energy, operations and parameters are those of the last weights over {images} evaluation images in equal
distances ({costs}), per image: of all operations, and with all weights and activations read from and written to SRAM;
with 32-bit numbers, and with 8-bit weights and real values. Synaptic operations are pairs of an input that is not 0 and
an output that it reaches, over all time steps; of the thresholds of a potential that are reached, the highest alone
counts. Time is that of the training steps of all epochs; where other work shared the machine, it is longer than it need
be. Memory is the most that the training process held, libraries and data among it, on a GPU that of its tensors
there."""


class Variant(NamedTuple):
    """The finished runs of a variant.

    Attributes:
        name: in tables.
        overrides: of the recipe.
        rows: values of each run by key, None where there is none; "unpriced" is the reason why there is no energy.
    """

    name: str
    overrides: Sequence[str]
    rows: list[dict[str, Any]]

    def values(self, key: str) -> list[float]:
        """Return a quantity of all runs that have it."""
        return [row[key] for row in self.rows if row.get(key) is not None]

    def mean(self, key: str) -> float | None:
        """Return its mean over the runs, None where none has it."""
        values = self.values(key)
        return statistics.mean(values) if values else None


def compare_runs(
    out: Path, variants: Mapping[str, Sequence[str]], command: Sequence[str], num_images: int, roots: Mapping[str, Path]
) -> None:
    """Write `FILES` about all finished runs of the variants in `out`, folders VARIANT_seedN.

    Args:
        out: folder of the runs.
        variants: overrides by name; with the first one the others are compared.
        command: that asks for it, for the page.
        num_images: evaluation images of which energy is measured, at most all there are.
        roots: where the data lie, by variant.
    """
    found = []
    for name, overrides in variants.items():
        runs = runs_of(out, name)
        metric = task_of(runs[0].config).headline[0]
        rows = [describe(run, metric, num_images, roots[name]) for run in runs if run.finished]
        found.append(Variant(name, overrides, rows))
    priced = [row for variant in found for row in variant.rows if not row["unpriced"]]
    facts = {
        "command": shlex.join(command),
        "metric": metric,
        "images": max((row["images"] for row in priced), default=0),
        "costs": HOROWITZ_45NM.name,
    }
    summaries = [summarise(variant, found[0], metric) for variant in found]
    whole = facts | {"variants": [row | {"runs": each.rows} for row, each in zip(summaries, found, strict=True)]}
    write_whole(out / "comparison.json", (json.dumps(whole, indent=2) + "\n").encode())
    write_csv(out / "comparison.csv", list(summaries[0]), [row.values() for row in summaries])
    save_png(
        draw_comparison({each.name: each.values(metric) for each in found}, f"{metric}, in [0, 1]"), out / FILES[3]
    )
    panels = []
    for title, key in (("Operations", "energy_uj"), ("Operations and SRAM", "energy_sram_uj")):
        points = {each.name: [(row[key], row[metric]) for row in each.rows if row.get(key)] for each in found}
        panels += draw_trade_off(points, title, f"{metric}, in [0, 1]", "uJ per image, 32 bits")
    if panels:
        save_png(panels, out / FILES[4])
    else:
        (out / FILES[4]).unlink(missing_ok=True)
    write_whole(out / "README.md", page(found, facts, bool(panels)).encode())


def runs_of(out: Path, variant: str) -> list[Run]:
    """Return the runs of a variant, folders VARIANT_seedN, in the order of their seeds."""
    found = (path.parent for path in out.glob(f"{variant}_seed*/config.yaml"))  # else a killed one has just begun
    seeds = {folder: folder.name.rpartition("_seed")[2] for folder in found}
    folders = sorted((folder for folder, seed in seeds.items() if seed.isdecimal()), key=lambda each: int(seeds[each]))
    return [Run.open(folder) for folder in folders]


def require_same_data(out: Path, recipes: Mapping[str, Recipe]) -> None:
    """Raise ValueError that names a run in `out` of other data than one with which its numbers would be compared.

    Those are training data of one variant, and evaluation images of all whose recipes say the same of them.
    """
    first: dict[tuple[str, str], tuple[Path, DataFingerprint]] = {}
    for name, recipe in recipes.items():
        places = {"train": name, "val": json.dumps(evaluation_data(recipe))}
        for run in runs_of(out, name):
            for split, now in run.info().data.items() if (run.folder / "run.json").is_file() else ():
                folder, before = first.setdefault((split, places[split]), (run.folder, now))
                if now != before:
                    what = f"{plural(now.images, 'image')}, there {before.images}, or other boxes, pixels or classes"
                    end = "remove one of the two, or name another --out"
                    raise ValueError(f"{run.folder}: its {split} data are not those of {folder}: {what}; {end}")


def describe(run: Run, metric: str, num_images: int, data_root: Path) -> dict[str, Any]:
    """Return the values of a finished run by key, see `Variant.rows`."""
    history = run.history()
    seconds, memory = ([getattr(line, key) for line in history] for key in ("seconds", "memory_mib"))
    row = {
        "seed": run.config.train.seed,
        metric: history[-1].metrics[metric],
        "activity": history[-1].metrics.get("activity"),
        "training_seconds": sum(filter(None, seconds)) if any(seconds) else None,
        "memory_mib": max(filter(None, memory), default=None),
        "unpriced": "",
    }
    try:
        found = analyse(run, num_images, data_root)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        return row | {"unpriced": " ".join(str(error).split())}
    name, own = next(iter(found["networks"].items()))
    eight = found["networks"].get(f"{name}_int8")
    row |= {
        key: network[quantity] / MILLION if (network := eight if int8 else own) else None
        for key, (_, quantity, int8) in ENERGIES.items()
    }
    return row | {
        "network": name,
        "images": found["num_images"],
        "time_steps": found["time_steps"],
        "synaptic_operations": sum(layer["num_synops"] for layer in found["layers"]),
        "twin_macs": found["networks"]["twin"]["macs"],
        "parameters": found["num_parameters"],
        "not_counted": found["unhandled"],
    }


def analyse(run: Run, num_images: int, data_root: Path) -> dict[str, Any]:
    """Return the analysis of a run's last weights, from its folder if it is there already; errors of `analyze_run`."""
    folder = run.folder / f"analysis_{num_images}_spread"
    wanted = {"sha256": run.info().sha256.get("last.safetensors"), "costs": asdict(HOROWITZ_45NM)}
    if (folder / "analysis.json").is_file():
        try:
            found = json.loads((folder / "analysis.json").read_text("utf-8"))
            if {key: found[key] for key in wanted} == wanted:
                return found
        except (ValueError, KeyError, TypeError):  # damaged: it is made again
            pass
    say(f"{folder}: energy of at most {num_images} images")
    analysis = analyze_run(run.folder, data_root=data_root, num_images=num_images)
    analysis.save(folder)
    return analysis.to_dict()


def summarise(variant: Variant, first: Variant, metric: str) -> dict[str, Any]:
    """Return the numbers of a variant's row in the tables: means over its runs."""
    values = variant.values(metric)
    return {
        "variant": variant.name,
        "overrides": shlex.join(variant.overrides),
        "seeds": len(values),
        metric: statistics.mean(values),
        f"{metric}_std": statistics.stdev(values) if len(values) > 1 else None,
        f"{metric}_minus_{first.name}": statistics.mean(values) - statistics.mean(first.values(metric)),
        **{key: variant.mean(key) for key in ("activity", *ENERGIES, *COSTS)},
        "unpriced": next((row["unpriced"] for row in variant.rows if row["unpriced"]), ""),
    }


def page(found: Sequence[Variant], facts: Mapping[str, Any], has_energy: bool) -> str:
    """Return README.md."""
    metric, first = facts["metric"], found[0]
    head = ["variant", "override", "seeds", metric, f"minus {first.name}", "spike activity"]
    rows = []
    for each in found:
        gap = "" if each is first else f"{each.mean(metric) - first.mean(metric):+.4f}"
        activity = each.values("activity")
        changed = f"`{shlex.join(each.overrides)}`" if each.overrides else "none"
        start = [each.name, changed, str(len(each.rows)), spread(each.values(metric), 4), gap]
        rows.append([*start, spread(activity, 4) if activity else "none", *energy_cells(each)])
    costs = [[each.name, *(cell(each.mean(key), *style) for key, (_, *style) in COSTS.items())] for each in found]
    parts = [
        "# Variants of one recipe",
        f"Made from the logs by `{facts['command']}`: {metric} and spike activity of the last epoch, mean and standard "
        "deviation over the seeds.",
        markdown([*head, *(title for title, *_ in ENERGIES.values())], rows),
        markdown(["variant", *(title for title, *_ in COSTS.values())], costs),
        TEXT.format(**facts),
        "![Variants](ablation.png)",
        *(["![Accuracy over energy](energy.png)"] if has_energy else []),
    ]
    return printable("\n\n".join(parts) + "\n", keep="\n")


def energy_cells(variant: Variant) -> list[str]:
    """Return the energies of a variant, or in the first cell why there are none."""
    reasons = list(dict.fromkeys(row["unpriced"] for row in variant.rows if row["unpriced"]))
    if reasons:
        return [f"not priced: {'; '.join(reasons)}", *[""] * (len(ENERGIES) - 1)]
    cells = [cell(variant.mean(key), 1, 3) for key in ENERGIES]
    row = variant.rows[0]
    names = {"energy_int8_uj": f"no 8-bit prices of a network with {row['network']} arithmetic"}
    cells = [text or names.get(key, "") for key, text in zip(ENERGIES, cells, strict=True)]
    if row["not_counted"]:
        cells[0] += f", without {', '.join(f'{name} ({kind})' for name, kind in row['not_counted'].items())}"
    return cells


def cell(value: float | None, unit: float, digits: int) -> str:
    """Return a number in a unit, nothing for None."""
    return "" if value is None else f"{value / unit:.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    first, *others = ("| " + " | ".join(each.replace("|", "\\|") for each in line) + " |" for line in (header, *rows))
    return "\n".join([first, f"|{'---|' * len(header)}", *others])
