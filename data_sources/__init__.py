"""Where examples come from: one file per source, each with `declared` and `read`."""
