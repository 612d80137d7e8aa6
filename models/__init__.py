"""What is specific to a model: specs, checkpoint layouts, the tiny family."""

if __name__ != "lltk.models":
    raise ImportError(f"{__name__}: this package is installed as lltk.models; import lltk.models")
