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
    recipes_folder,
    require_same,
    save_config,
    set_values,
    spread_values,
)
from detection.config.registry import import_plugins, recipe_kinds, register_recipe
from detection.config.schema import Recipe, Section

__all__ = [
    "FREE_KEYS",
    "Recipe",
    "Section",
    "find_recipe",
    "flatten",
    "import_plugins",
    "load_config",
    "override",
    "parse_recipe",
    "print_keys",
    "read_recipe",
    "recipe_kinds",
    "recipe_names",
    "recipes_folder",
    "register_recipe",
    "require_same",
    "save_config",
    "set_values",
    "spread_values",
]
