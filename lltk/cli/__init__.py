"""The `lltk` command: one file a sub-command, thin."""
