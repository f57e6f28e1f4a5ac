"""From a recording to shards: time, tiles, labels, prompts, splits. Pure functions, and the shards' files."""
