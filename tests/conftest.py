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


@pytest.hookimpl(tryfirst=True) # before any fixture
def pytest_runtest_setup():
    """One thread, whatever a notebook before has set: rounding may depend on their number, and threads that share a core wait for each other."""
    if torch := sys.modules.get("torch"): torch.set_num_threads(1)


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


@pytest.hookimpl(optionalhook=True) # where xdist is not installed, nobody asks
def pytest_xdist_make_scheduler(config, log):
    """What `pytest -n 2` hands to a worker in one piece. Not the marker `xdist_group`: xdist 3.8 does not see it under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        """A file stays together, for its tests share what they prepared. Every notebook stands alone, and so do the figures of every chapter,
        whose further parts show the same runs. Pieces of few tests begin last, so that no worker is left with a long one."""
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            if file.endswith("test_notebooks.py"): return nodeid
            if test.startswith("test_chapter_makes_its_figures["): return test.rstrip("]").split("_inside")[0].split("_choices")[0]
            return file

    return Together(config, log)
