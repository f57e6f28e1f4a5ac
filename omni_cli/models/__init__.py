"""Networks. Torch only: they take plain values and know no settings tree."""
