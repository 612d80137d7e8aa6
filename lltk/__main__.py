"""``python -m lltk``, which torchrun can start."""

from lltk.cli.main import main

if __name__ == "__main__":
    main()
