"""What every test starts from, and what tests of several files share: warm processes, a hub to fetch clips from."""

import os
import signal

import pytest

# A shell without job control starts what it puts in the background with Ctrl-C ignored, and every child inherits that:
# the tests that press Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What a shell says of its screen changes how lines and tables are drawn; a test about that says it itself.
for variable in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(variable, None)


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """Starts processes that need not import torch again."""
    from tests.support.warm import Warm

    warm = Warm(tmp_path_factory.mktemp("warm"))
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """Two chunks whose camera zips are large enough to be fetched by clips; read it alone."""
    from tests.support.clips import write_repository

    return write_repository(tmp_path_factory.mktemp("repository"))


@pytest.fixture
def hub(repository, tmp_path_factory, monkeypatch):
    """A hub that serves a copy of the repository, which a test may spoil."""
    from tests.support.clips import served

    with served(repository, tmp_path_factory.mktemp("hub"), monkeypatch) as hub:
        yield hub


@pytest.fixture
def push_hub(monkeypatch):
    """A hub that takes models, to which this process pushes."""
    from tests.support.hub_push import serve_pushes

    with serve_pushes() as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield hub
