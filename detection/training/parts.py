"""Parts of a network by name: what stays as it is, and learning rates of its own."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from backbones import spike_layers
from backbones.measure.certificate import is_within
from detection.text import plural

Aliases = Mapping[str, tuple[str, ...]]


def find_parts(model: nn.Module, names: Iterable[str], aliases: Aliases, key: str) -> dict[str, tuple[str, ...]]:
    """Return the names of the modules that each name of a part stands for.

    Args:
        model: the network.
        names: of modules, or beginning with an alias, which counts where no module has that name.
        aliases: modules by the name of a part, see `Task.parts`.
        key: of the recipe, for the message.

    Raises:
        ValueError: a name fits nothing; says which is near.
    """
    known = {name for name, _ in model.named_modules() if name} | {name for name, _ in model.named_parameters()}
    found = {}
    for name in names:
        first, *rest = name.split(".")
        meant = [".".join([part, *rest]) for part in aliases.get(first, ())]
        found[name] = tuple(part for part in meant if part in known) or ((name,) if name in known else ())
        if not found[name]:
            close = difflib.get_close_matches(name, sorted({*known, *aliases}), n=1, cutoff=0.5)
            top = dict.fromkeys([*aliases, *(each for each, _ in model.named_children())])
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"{key}: the network has no part {name!r}{hint} (allowed: {', '.join(top)}, and what they contain)"
            )
    return found


def describe_parts(model: nn.Module, factors: Mapping[str, float]) -> list[str]:
    """Return a sentence about the parameters that stay as they are, and one for each learning rate of its own."""
    parameters = dict(model.named_parameters())
    frozen = [each for each in parameters.values() if not each.requires_grad]
    sentences = [f"frozen: {_count(frozen)} of {_count(parameters.values())}"] if frozen else []
    for factor in sorted(set(factors.values())):
        chosen = [parameters[name] for name, each in factors.items() if each == factor]
        sentences.append(f"learning rate times {factor:g}: {_count(chosen)}")
    return sentences


def _count(parameters: Collection[nn.Parameter]) -> str:
    return f"{sum(each.numel() for each in parameters):,} parameters in {plural(len(parameters), 'tensor')}"


def freeze(model: nn.Module, names: Iterable[str], aliases: Aliases) -> list[nn.Module]:
    """Take parts out of the training, and return their layers: they belong into evaluation mode at all times.

    Their parameters get no gradient, and their spike layers, whose extremum is then the running average, have no term
    in the loss.

    Raises:
        ValueError: a name fits nothing, or nothing is left to train.
    """
    parts = [part for found in find_parts(model, names, aliases, "train.freeze").values() for part in found]
    if not parts:
        return []
    for name, parameter in model.named_parameters():
        if is_within(name, parts):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"train.freeze: {', '.join(names)} leaves no parameter to train")
    for name, layer in (spikes := spike_layers(model)).items():
        if is_within(name, parts):
            layer.has_penalty = False
    found = [(name, module) for name, module in model.named_modules() if is_within(name, parts)]
    # Not containers: a detector's tell by their mode whether losses are wanted.
    return [module for name, module in found if name in spikes or not next(module.children(), None)]


def factors_of(model: nn.Module, factors: Mapping[str, float], aliases: Aliases) -> dict[str, float]:
    """Return the factor on the learning rate of each parameter that one of `optimizer.lr_factors` fits.

    Of several that fit, the longest module name counts.
    """
    found = find_parts(model, factors, aliases, "optimizer.lr_factors")
    parts = sorted(((part, name) for name in found for part in found[name]), key=lambda each: len(each[0]))
    return {
        name: factors[part_name]
        for name, parameter in model.named_parameters()
        for part, part_name in parts
        if parameter.requires_grad and is_within(name, [part])
    }
