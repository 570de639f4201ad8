"""Recipes: one YAML file says all that a run depends on. Nothing here needs torch."""

from detection.config.io import (
    FREE_KEYS,
    find_recipe,
    flatten,
    load_config,
    override,
    parse_recipe,
    print_keys,
    read_recipe,
    recipe_names,
    require_same,
    save_config,
    set_values,
    spread_values,
)
from detection.config.registry import recipe_kinds, register_recipe
from detection.config.schema import Recipe

__all__ = [
    "FREE_KEYS",
    "Recipe",
    "find_recipe",
    "flatten",
    "load_config",
    "override",
    "parse_recipe",
    "print_keys",
    "read_recipe",
    "recipe_kinds",
    "recipe_names",
    "register_recipe",
    "require_same",
    "save_config",
    "set_values",
    "spread_values",
]
