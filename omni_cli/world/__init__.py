"""The synthetic drive: a small 3-D world, its renderer, its ego motion, and a writer of the real layout."""
