"""What a pickle of another hand may hold."""

import os
from pathlib import Path


class Hostile:
    """Where it is loaded from a pickle, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)
