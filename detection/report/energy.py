"""The sections of an analysis: energy per layer, networks side by side, the binarity certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from detection.curves import short_names
from detection.report.source import Source
from detection.report.words import format_count, format_energy
from detection.sections import Bar, Bars, Cell, Details, Section, Table, Words, percent, score
from detection.text import plural

# The networks of an analysis in words, and the colours of their bars.
NETWORKS = {
    "spiking": ("spiking", "cold-0"),
    "spiking_int8": ("spiking, 8-bit weights", "cold-0"),
    "twin": ("analogue twin", "warm-0"),
    "twin_int8": ("8-bit twin", "warm-0"),
    "binary": ("binary network", "quiet"),
}


def look(name: str) -> tuple[str, str]:
    """Return a network of an analysis in words, and the colour of its bars; an arithmetic has no words of its own."""
    return NETWORKS.get(name, (f"{name} network", "quiet"))


def layer_energy(source: Source) -> list[Any]:
    """Return the energy of each layer with weights, as bars and in numbers."""
    if source.analysis is None:
        return [Words(f"Energy per layer is left out. {source.missing['analysis']}", "missing")]
    analysis, layers = source.analysis, source.analysis["layers"]
    networks = list(dict.fromkeys((next(iter(analysis["networks"])), "twin")))
    names = short_names([layer["name"] for layer in layers])
    highest = max((energy for layer in layers for energy in layer["energy_pj"].values()), default=0.0) or 1.0
    swatch = '<span class="keyword"><span class="swatch fill {}"></span>&nbsp;{}</span>'
    legend = Markup(", ").join(Markup(swatch).format(look(name)[1], look(name)[0]) for name in networks)
    bars = [
        (
            names[layer["name"]],
            [Bar(layer["energy_pj"][name] / highest, look(name)[1]) for name in networks],
            [format_energy(layer["energy_pj"][name]) for name in networks],
        )
        for layer in layers
    ]
    return [
        Words("Energy of the operations of each convolution and linear layer", "heading"),
        Markup(f"Per image, mean over {analysis['num_images']:d} evaluation images, memory traffic left aside. ")
        + legend
        + ".",
        Bars(bars),
        Details("Operations of each layer in numbers", [operations_table(analysis, networks, names)]),
    ]


def operations_table(analysis: Mapping[str, Any], networks: list[str], names: Mapping[str, str]) -> Table:
    """Return input, operations and energy of each layer with weights."""
    columns = ("layer", "kind", "input", "input activity", "exact MACs", "synaptic operations", "comparisons")
    rows = [
        (
            names[layer["name"]],
            layer["kind"],
            layer["input"] or "never ran",
            percent(layer["input_activity"]),
            *(Cell(format_count(layer[key]), layer[key]) for key in ("exact_macs", "num_synops", "comparisons")),
            *(joule(layer["energy_pj"][name]) for name in networks),
        )
        for layer in analysis["layers"]
    ]
    return Table("Operations per layer", (*columns, *(look(name)[0] for name in networks)), rows, code=True)


def steps_table(steps: Sequence[Mapping[str, Any]], scores: Mapping[str, Sequence[float]]) -> Table:
    """Return activity, operations and energy of each time step, and what a network stopped after it costs and finds."""
    shown = {key: values for key, values in scores.items() if len(values) == len(steps)}
    rows = []
    for index, row in enumerate(steps):
        alone, so_far = (next(iter(row[key].values())) for key in ("networks", "so_far"))
        rows.append(
            (
                str(row["step"]),
                percent(row["activity"]),
                Cell(format_count(row["num_synops"]), row["num_synops"]),
                joule(alone["total_pj"]),
                *(joule(so_far[key]) for key in ("total_pj", "total_sram_pj")),
                *(score(values[index]) for values in shown.values()),
            )
        )
    columns = ("step", "activity", "synaptic operations", "energy of the step", "energy so far", "with SRAM so far")
    return Table("Time steps", (*columns, *(f"{key} so far" for key in shown)), rows, sortable=False)


def networks_section(source: Source) -> Section:
    """Return the section with the energy of the run's network beside others of the same topology."""
    place = ("networks", "Networks", "Networks side by side")
    if source.analysis is None:
        return Section(*place, [], source.missing["analysis"])
    analysis, networks = source.analysis, source.analysis["networks"]
    own = next(iter(networks.values()))["total_pj"]
    rows = [
        (
            look(name)[0],
            *(Cell(format_count(network[key]), network[key]) for key in ("macs", "acs", "comparisons")),
            joule(network["total_pj"]),
            Cell(f"{network['total_pj'] / own:.3g}\N{MULTIPLICATION SIGN}" if own else ""),
            *(Cell(format_count(network[key]), network[key]) for key in ("weight_bits", "activation_bits")),
            *(joule(network[key]) for key in ("total_sram_pj", "total_dram_pj")),
        )
        for name, network in networks.items()
    ]
    columns = ("network", "MACs", "ACs", "comparisons", "operations", "ratio", "weights, bits", "activations, bits")
    text = (
        "The energy of one image in the network of this run and in networks of the same topology: the analogue twin "
        "(ReLU), both with 8-bit numbers, and a binary network that does not skip zeros. Mean over "
        f"{analysis['num_images']} evaluation images; prices: {analysis['costs']['name']}."
    )
    note = (
        "Full colour: operations. Pale: memory traffic, if all of it goes to SRAM. The number is their sum. In the "
        'table, "ratio" is the energy of the operations in units of the first row\'s.'
    )
    table = Table("Networks side by side", (*columns, "with SRAM", "with DRAM"), rows, sortable=False, lead=True)
    return Section(*place, [text, network_bars(networks), Words(note, "note"), table])


def network_bars(networks: Mapping[str, Mapping[str, Any]]) -> Bars:
    """Return the energy of networks of an analysis, operations and memory traffic to SRAM, on one scale."""
    most = max(network["total_sram_pj"] for network in networks.values()) or 1.0
    return Bars(
        [
            (
                look(name)[0],
                [Bar(network["total_pj"] / most, look(name)[1], network["memory_sram_pj"] / most)],
                [format_energy(network["total_sram_pj"])],
            )
            for name, network in networks.items()
        ]
    )


def certificate_section(source: Source) -> Section:
    """Return the section that says whether what the layers saw was binary."""
    place = ("certificate", "Certificate", "Binarity certificate")
    if source.analysis is None:
        return Section(*place, [], source.missing["analysis"])
    certificate = source.analysis["certificate"]
    verdict, note = certificate_verdict(source.analysis)
    look = "good" if certificate["binary"] else "bad" if source.task.spiking else ""
    images = source.analysis["num_images"]
    parts: list[Any] = [
        Markup('<strong class="{}">{}.</strong> {} ').format(look, verdict.capitalize(), note)
        + f"The inputs of every convolution and linear layer were looked at on {images} evaluation images."
    ]
    titles = {"violations": "Violations", "exceptions": "Exceptions, real-valued by design"}
    for key, title in titles.items():
        if certificate[key]:
            rows = [(row["layer"], row["reason"]) for row in certificate[key]]
            parts.append(Table(title, (title, "why"), rows, sortable=False, code=True))
    return Section(*place, parts)


def certificate_verdict(analysis: Mapping[str, Any]) -> tuple[str, str]:
    """Return a word or two, and a sentence with what is behind them."""
    certificate = analysis["certificate"]
    if "spiking" not in analysis["networks"]:
        kinds = certificate.get("arithmetics", {})
        note = "".join(f" {plural(number, f'{kind} convolution')}." for kind, number in kinds.items())
        return " and ".join(kinds) or "analogue", f"It has no spike layer.{note}"
    if certificate["violations"]:
        number = len(certificate["violations"])
        return "not binary", f"{plural(number, 'layer sees', 'layers see')} other values than 0 and 1."
    layers, exceptions = plural(certificate["num_binary"], "layer"), len(certificate["exceptions"])
    if exceptions <= 1:  # the stem, which is always allowed to see pixels
        return "binary", f"{layers}, all but the first, which sees pixels, saw 0 and 1 only."
    return f"binary, {exceptions} exceptions", f"{layers} saw 0 and 1 only; {exceptions} are real-valued by design."


def joule(picojoule: float) -> Cell:
    """Return an energy."""
    return Cell(format_energy(picojoule), picojoule)
