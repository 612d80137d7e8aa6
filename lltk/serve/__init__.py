"""A server of live streams and of video jobs; `lltk serve` starts it."""
