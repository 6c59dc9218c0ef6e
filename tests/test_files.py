"""What the disk holds after the worst moment."""
import os
import random
import subprocess
import sys
import tempfile
import time

import pytest

from musicssl import files

posix = pytest.mark.skipif(os.name == "nt", reason="needs kill -9")
WRITE_FOR_EVER = """
import itertools, sys
from contextlib import contextmanager
from pathlib import Path
from musicssl import files
@contextmanager
def plain(path): yield path
write = {"atomic": files.atomic, "plain": plain}[sys.argv[1]]
for n in itertools.count():
    with write(Path("song")) as path, open(path, "w") as file:
        for _ in range(2000): file.write(f"{n}\\n"); file.flush()
    print(n, flush=True)
"""


def versions_after_kills(folder, how, kills, seed=0):
    """Kill a process that rewrites one file, again and again; what the file held each time, as (lines, distinct lines)."""
    draw, seen = random.Random(seed), []
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, how], cwd=folder, stdout=subprocess.PIPE, text=True)
        for _ in range(2): process.stdout.readline()
        time.sleep(draw.uniform(0, .02))
        process.kill()
        process.wait()
        lines = (folder / "song").read_text().splitlines()
        seen.append((len(lines), len(set(lines))))
    return seen


@posix
def test_a_killed_writer_leaves_the_old_or_the_new_file(tmp_path):
    assert set(versions_after_kills(tmp_path, "atomic", 8)) == {(2000, 1)}
    assert files.remove_leftovers(tmp_path) and [p.name for p in tmp_path.iterdir()] == ["song"]


@posix
def test_a_plain_writer_does_not(tmp_path):
    assert set(versions_after_kills(tmp_path, "plain", 8)) != {(2000, 1)}


def test_a_failed_write_keeps_the_file_and_leaves_nothing(tmp_path):
    files.write_json(tmp_path / "a.json", {"version": 1})
    with pytest.raises(TypeError): files.write_json(tmp_path / "a.json", {"version": object()})
    with pytest.raises(KeyError), files.atomic(tmp_path / "a.json") as path:
        path.write_text("half")
        raise KeyError
    assert files.read_json(tmp_path / "a.json") == {"version": 1} and len(list(tmp_path.iterdir())) == 1


def test_the_temporary_folder_of_the_system_is_not_used(tmp_path, monkeypatch):
    """It may be on another file system, where a rename is a copy."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with files.atomic(tmp_path / "a.txt") as path:
        assert os.stat(path.parent).st_dev == os.stat(tmp_path).st_dev and path.suffix == ".txt"
        path.write_text("a")
    assert (tmp_path / "a.txt").read_text() == "a"


def test_content_is_flushed_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *paths: order.append("rename") or replace(*paths))
    with files.atomic(tmp_path / "a.txt") as path: path.write_text("a")
    assert order == (["fsync", "rename", "fsync"] if os.name != "nt" else ["fsync", "rename"])


@posix
@pytest.mark.parametrize("write", ["path.write_bytes(bytes(10**6))", "open(path, 'wb').write(bytes(10**6))",
                                   "import torch; f = open(path, 'wb'); torch.save(torch.zeros(10**6), f)",
                                   "import torch, safetensors.torch as s; s.save_file({'a': torch.zeros(10**6)}, path)"])
def test_no_room(tmp_path, write):
    """Python's own writer, PyTorch's and safetensors' all end in one error that names the file."""
    (tmp_path / "good").write_text("good")
    code = f"""
import resource
from pathlib import Path
from musicssl import files
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
try:
    with files.atomic(Path("good")) as path: {write}
except OSError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "no room to write good: stopped after" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "good").read_text() == "good" and [p.name for p in tmp_path.iterdir()] == ["good"]


def test_a_folder_appears_whole(tmp_path):
    with pytest.raises(RuntimeError), files.atomic(tmp_path / "step") as folder:
        folder.mkdir()
        (folder / "weights").write_text("w")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with files.atomic(tmp_path / "step") as folder:
        folder.mkdir()
        (folder / "weights").write_text("w")
        assert not (tmp_path / "step").exists()
    assert (tmp_path / "step" / "weights").read_text() == "w"


def test_leftovers_of_another_machine_are_kept_for_a_day(tmp_path):
    other = tmp_path / ".tmp-another-host-1-abc"
    other.mkdir()
    assert files.remove_leftovers(tmp_path) == []
    os.utime(other, (time.time() - 90_000,) * 2)
    assert files.remove_leftovers(tmp_path) == [other.name]


@posix
def test_a_lock_ends_with_its_process(tmp_path):
    code = "import time\nfrom musicssl import files\nwith files.lock('.lock'): print('held', flush=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    began = time.perf_counter()
    with pytest.raises(files.Locked, match=f"held by process {owner.pid} on .* since"), files.lock(tmp_path / ".lock"): pass
    assert time.perf_counter() - began < 1
    owner.kill()
    owner.wait()
    with files.lock(tmp_path / ".lock"): pass


def test_a_lock_is_released_by_an_error_and_not_shared_within_a_process(tmp_path):
    with pytest.raises(KeyError), files.lock(tmp_path / ".lock"): raise KeyError
    with files.lock(tmp_path / ".lock"):
        with pytest.raises(files.Locked), files.lock(tmp_path / ".lock", timeout=.1): pass
