"""The vocabulary: frozen types with units and frames in their names. No torch, no files."""
