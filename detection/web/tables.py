"""Words and tables of the page, as HTML; all names in it are escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from markupsafe import Markup

from detection.curves import short_names
from detection.report.energy import joule, look, network_bars
from detection.report.page import environment_of_parts
from detection.report.words import format_count, format_energy
from detection.sections import Cell, Table, Words, percent
from detection.web.answers import Answer

SHOWN = ("spiking", "spiking_int8", "twin", "twin_int8")
WAIT = "\N{HORIZONTAL ELLIPSIS}"
DASH = "\N{EN DASH}"
NOISY = ("without noise", "outputs that the noise flips", "noise left out")  # rows that are not always there


@cache
def _macros() -> Any:
    return environment_of_parts().get_template("parts.html.j2").module


def render(parts: Sequence[Any]) -> str:
    """Return parts of `detection.sections` as HTML."""
    return Markup('<div class="parts">{}</div>').format(_macros().parts(parts, None, 3))


def sentence(text: str, *, wrong: bool = False) -> str:
    """Return a line that a screen reader reads out when it comes."""
    role = "alert" if wrong else "status"
    return Markup('<p class="said{}" role="{}">{}</p>').format(" wrong" if wrong else "", role, text)


def summary(answers: Mapping[str, Answer | None], score: float) -> str:
    """Return the networks side by side: what they found, how much fires, what it costs, how long it took.

    A network without an answer has the same rows, so that the page keeps its shape.
    """
    rows = {
        "found": lambda answer: str(answer.prediction.above(score)),
        "without noise": lambda answer: "" if answer.clean is None else _since(answer, score),
        "neurons that fire": _activity,
        "outputs that the noise flips": _flips,
        "synaptic operations": _operations,
        "energy of the operations": _energy,
        "analogue twin's": lambda answer: _energy(answer, "twin"),
        "with 8-bit weights": lambda answer: _energy(answer, "spiking_int8"),
        "8-bit twin's": lambda answer: _energy(answer, "twin_int8"),
        "time in the network": lambda answer: f"{1000 * answer.seconds:.0f} ms",
        "from the file to the picture": _whole,
        "noise left out": lambda answer: "; ".join(f"{kind}: {why}" for kind, why in answer.left_out.items()),
    }
    cells = [
        (name, *(("" if name in NOISY else DASH) if answer is None else value(answer) for answer in answers.values()))
        for name, value in rows.items()
    ]
    columns = ("", *answers)
    return render([Table("Networks on this picture", columns, [row for row in cells if any(row[1:])], sortable=False)])


def costs(answers: Mapping[str, Answer]) -> str:
    """Return operations and energy of this picture for each network: beside its twins, and layer by layer."""
    parts: list[Any] = []
    for name, answer in answers.items():
        if answer.analysis is None:
            continue
        analysis = answer.analysis
        networks = {network: energy for network, energy in analysis["networks"].items() if network in SHOWN}
        networks = networks or analysis["networks"]
        note = "Energy of this picture. Full colour: operations; pale: memory traffic, if all of it goes to SRAM. "
        parts += [Words(name, "heading"), network_bars(networks)]
        parts += [Words(note + analysis["costs"]["name"] + ".", "note"), _layers(name, analysis, list(networks))]
    return render(parts)


def _layers(name: str, analysis: Mapping[str, Any], networks: Sequence[str]) -> Table:
    names = short_names([layer["name"] for layer in analysis["layers"]])
    columns = ("layer", "input", "fires in front", "fires behind", "synaptic operations", "MACs")
    rows = [
        (
            names[layer["name"]],
            layer["input"] or "never ran",
            *(
                Cell(DASH) if layer[key] is None else percent(layer[key])
                for key in ("input_activity", "output_activity")
            ),
            *(Cell(format_count(layer[key]), layer[key]) for key in ("num_synops", "exact_macs")),
            *(joule(layer["energy_pj"][network]) for network in networks),
        )
        for layer in analysis["layers"]
    ]
    title = f"Layers of {name} on this picture"
    return Table(title, (*columns, *(look(network)[0] for network in networks)), rows, sortable=False, code=True)


def _since(answer: Answer, score: float) -> str:
    return f"{answer.clean.above(score)}; of these, {answer.prediction.above(score).since(answer.clean.above(score))}"


def _activity(answer: Answer) -> str:
    if answer.analysis is None:
        return WAIT
    if answer.activity is None:
        return "no spike layers"
    noisy, clean = answer.activity
    return f"{noisy:.1%}" + ("" if clean is None else f" ({clean:.1%} without noise)")


def _flips(answer: Answer) -> str:
    if answer.flips is None:
        return ""
    return f"{answer.flips[0]:.1%} of the neurons; {answer.flips[1]:.1%} of the spikes vanish"


def _operations(answer: Answer) -> str:
    if answer.analysis is None:
        return WAIT
    own = next(iter(answer.analysis["networks"].values()))
    return f"{format_count(own['acs'])} AC, {format_count(own['macs'])} MAC"


def _energy(answer: Answer, other: str | None = None) -> str:
    """The energy of the network's operations, or of another one's and how many times as much."""
    if answer.analysis is None:
        return WAIT
    energies = {name: network["total_pj"] for name, network in answer.analysis["networks"].items()}
    first, own = next(iter(energies.items()))
    if other is None:
        return format_energy(own)
    if other == first or other not in energies:
        return DASH
    return format_energy(energies[other]) + (f" ({energies[other] / own:.2g}\N{MULTIPLICATION SIGN})" if own else "")


def _whole(answer: Answer) -> str:
    return (
        WAIT if answer.drawing_seconds is None else f"{1000 * (answer.whole_seconds + answer.drawing_seconds):.0f} ms"
    )
