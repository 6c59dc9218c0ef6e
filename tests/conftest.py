"""What all tests share: one thread, no window, and folders of their own for the cache and the figures."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "workers"))

os.environ.update({
    "OMP_NUM_THREADS": "1", # read when NumPy and torch are imported; threads that wait for each other cost seven times the processor time
    "MPLBACKEND": "Agg",
    "MUSICSSL_ROOT": str(ROOT),
    "MUSICSSL_CACHE": os.environ.get("MUSICSSL_TEST_CACHE", str(ROOT / ".cache" / "test")),
    "MUSICSSL_FIGURES": str(ROOT / ".cache" / "figures"),
    "MUSICSSL_PROFILE": "test",
})


@pytest.fixture(scope="module")
def one_thread():
    """Torch on one thread: rounding depends on their number, and threads that share a core with other tests wait for each other."""
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """Sounds are opened once, features are kept in a folder of their own."""
    from functools import cache

    from musicssl.probe import frozen
    from musicssl.probe.tasks import DATASETS
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "cache_dir", lambda: folder)
        for name, opens in list(DATASETS.items()): patch.setitem(DATASETS, name, cache(opens))
        yield


@pytest.fixture(scope="session")
def as_pair(tmp_path_factory):
    """A function: what each of two processes made of `work(rank, folder)`, see `workers/pair.py`."""
    from pair import run_as_pair
    return lambda work: run_as_pair(work, tmp_path_factory.mktemp(work.__module__))


@pytest.hookimpl(tryfirst=True) # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    """`pytest -n 2 --dist loadgroup`: a file stays together, for its tests share what they prepared; every notebook stands alone, and so do the
    figures of every chapter, whose further parts show the same runs. Groups of few tests begin last, so no worker is left with a long one."""
    for item in items:
        group = item.path.name
        if item.originalname == "test_chapter_makes_its_figures": group = f"chapter {item.callspec.params['chapter'].name.split('_')[0]}"
        if group != "test_notebooks.py": item.add_marker(pytest.mark.xdist_group(group))
