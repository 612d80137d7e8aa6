"""What is specific to a model: its family, spec, configurations, layouts; and the tiny model."""

if __name__ != "lltk.models":
    raise ImportError(f"{__name__}: this package is installed as lltk.models; import lltk.models")
