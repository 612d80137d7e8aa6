"""Recipes: YAML files that name a model, its passes and their settings."""

if __name__ != "lltk.recipes":
    raise ImportError(f"{__name__}: this package is installed as lltk.recipes; import lltk.recipes")
