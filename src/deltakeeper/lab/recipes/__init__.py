"""Recipes: attacks as typed YAML, each with its source, its published settings and some that fit two cores."""

from deltakeeper.lab.recipes.reading import list_recipes, load_recipe
from deltakeeper.lab.recipes.recipe import Preset, Recipe, Source
from deltakeeper.lab.recipes.table import recipe_table, recipes_page

__all__ = ["Preset", "Recipe", "Source", "list_recipes", "load_recipe", "recipe_table", "recipes_page"]
