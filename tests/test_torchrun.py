"""`torchrun` on two CPU processes trains CLMR from the command line, and the record is the one a single process would have written."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from musicssl import records, reproduce, settings

COMMAND = ["train", "--profile", "test", "--paper", "clmr", "--arm", "clmr"]


def record_of(folder):
    record, = records.load_all(folder / "test" / "records" / "clmr")
    return record


@pytest.fixture(scope="module")
def alone_and_together(tmp_path_factory):
    """The same run by one process and by two; both with the corpora of the tests' cache and work in progress of their own."""
    found = []
    for name in ("alone", "together"):
        folder, shared = tmp_path_factory.mktemp(name), settings.cache_dir()
        (folder / "cache").mkdir()
        for path in shared.iterdir():
            if path.name != "runs": (folder / "cache" / path.name).symlink_to(path)
        variables = {"MUSICSSL_FIGURES": str(folder), "MUSICSSL_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        if name == "alone":
            with pytest.MonkeyPatch.context() as patch:
                for variable in variables.items(): patch.setenv(*variable)
                assert reproduce.main(COMMAND) == 0
        else:
            musicssl = Path(sys.executable).with_name("musicssl")
            done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", musicssl, *COMMAND],
                                  env={**os.environ, **variables}, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr
            assert done.stdout == "clmr at test: 1 done, 0 running, 0 missing\n", "one process speaks"
        found.append(record_of(folder))
    return found


def test_the_same_record(alone_and_together):
    alone, together = alone_and_together
    assert together.key == alone.key and together.config == alone.config
    assert together.metrics.keys() == alone.metrics.keys() and together.arrays.keys() == alone.arrays.keys()
    assert {name: array.shape for name, array in together.arrays.items()} == {name: array.shape for name, array in alone.arrays.items()}
    assert all((together.arrays[name] == alone.arrays[name]).all() for name in ("labels", "group"))
    assert [row.keys() for row in together.history] == [row.keys() for row in alone.history]
    assert together.provenance.keys() == alone.provenance.keys() and (alone.provenance["processes"], together.provenance["processes"]) == (1, 2)


def test_the_same_training(alone_and_together):
    """Equal views, negatives and batch statistics. Read-outs may differ: biases in front of a normalisation have no gradient but rounding, Adam
    makes steps of full length of it, and running means are a few steps late to follow."""
    alone, together = alone_and_together
    for name in ("loss", "positive_similarity", "grad_norm", "lr", "clips", "step"):
        assert [row[name] for row in together.history] == pytest.approx([row[name] for row in alone.history], rel=1e-4)
    assert len(together.history) == int(settings.load("test", "clmr")["steps"])
    assert together.arrays["before"] == pytest.approx(alone.arrays["before"], abs=1e-5)


def test_mutation_other_views(alone_and_together):
    """The next batch's loss stands for one of other views and other negatives: a hundred times further away than that of two processes."""
    alone, together = ([row["loss"] for row in record.history] for record in alone_and_together)
    assert abs(alone[1] - alone[0]) > 100 * abs(together[0] - alone[0])
