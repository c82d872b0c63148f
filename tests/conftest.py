import importlib
import signal

import pytest

# The tests send SIGINT to what they start. A background job of a shell script (`pytest &`) ignores it, and what it
# starts does as well: without this line such a test run waits for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, and runs with `-m slow` alone")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes a minute: python -m pytest -m slow runs it"))


@pytest.fixture(params=["stsac", "stddpg"])
def script(request):
    """Each of the off-policy scripts."""
    return importlib.import_module(request.param)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
