"""A run that was killed again and again ends exactly where an undisturbed one ends; and this test can tell."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musicssl.checkpoint import checkpoints, read_log

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill -9")
WORKER = Path(__file__).parent / "workers" / "killed.py"


def train_killed(folder, how="never", mutation="none", kills=0, seed=0):
    command = [sys.executable, WORKER, folder, how, mutation, str(kills), str(seed)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})


def left_behind(folder):
    """Weights, optimiser state and log (without the clock) of a finished run."""
    last = checkpoints(folder)[-1]
    rows = [{name: value for name, value in row.items() if name not in ("seconds", "clips_per_second", "matrix_share", "peak_memory_mb")} for row in read_log(folder)]
    return last.name, load_file(last / "model.safetensors"), torch.load(last / "resume.pt", weights_only=True), rows


def equal(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = train_killed(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return left_behind(folder)


@pytest.mark.parametrize("how, kills, seed, kept", [("random", 20, 1, (44, 48)), ("writing", 20, 2, (47, 48))])
def test_kill_and_resume(tmp_path, undisturbed, how, kills, seed, kept):
    done = train_killed(tmp_path, how, kills=kills, seed=seed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[1]) >= (kills if how == "writing" else 5), done.stdout
    assert undisturbed[0] == "step-00000048" and len(undisturbed[3]) == 48
    assert equal(left_behind(tmp_path), undisturbed)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == ["log.jsonl", *(f"step-{step:08d}" for step in kept)]


@pytest.mark.parametrize("mutation", ["plain write", "log kept", "one random stream", "optimiser forgotten"])
def test_the_comparison_notices(tmp_path, undisturbed, mutation):
    """With one protection taken away the run must fail, or end elsewhere."""
    done = train_killed(tmp_path, "writing", mutation, kills=2, seed=2)
    assert "killed 0 times" not in done.stdout
    assert done.returncode != 0 or not equal(left_behind(tmp_path), undisturbed), json.dumps(done.stdout)
