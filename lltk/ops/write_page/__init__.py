"""Writing a page of the cache."""
