"""A chunk's own keys and values in E4M3, beside pages that are kept decoded."""
