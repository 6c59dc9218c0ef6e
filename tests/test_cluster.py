"""A grid and whatever machines there are: shells, SLURM tasks (with a stand-in for srun), submitit; and processes that are asked to end."""
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest
import torch

from musicssl import cluster, experiments, files, records, reproduce, settings

RUNS = 6
EXPERIMENT = f'''
import os, time

def prepare(profile): pass
def grid(profile): return [{{"arm": "toy", "seed": seed}} for seed in range({RUNS})]
def describe(config): return f"toy, seed {{config['seed']}}"

def run(config, folder):
    """Waits until as many processes as the test wants are at work; so each of them gets something."""
    met = folder.parent / "met"
    met.mkdir(exist_ok=True)
    (met / str(os.getpid())).touch()
    until = time.monotonic() + 120
    while len(list(met.iterdir())) < int(os.environ["HANDS"]) and time.monotonic() < until: time.sleep(.05)
    with open(met.parent / "diary.txt", "a") as diary: diary.write(f"{{config['seed']}}\\n")
    return {{"process": os.getpid()}}, {{}}
'''


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A project of one chapter without music; processes started with its environment know it too."""
    (tmp_path / "nbs" / "papers").mkdir(parents=True)
    cell = nbformat.v4.new_code_cell("#| default_exp experiments.toy")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "nbs" / "papers" / "1_toy.ipynb")
    (tmp_path / "settings.ini").write_text("[project]\nprofile = test\n[test]\nworkers = 2\nthreads = 1\n[test.toy]\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "toy.py").write_text(EXPERIMENT)
    (tmp_path / "sitecustomize.py").write_text(f"import musicssl.experiments\nmusicssl.experiments.__path__.append({str(tmp_path / 'more')!r})\n")
    for name, value in {"ROOT": tmp_path, "CACHE": tmp_path / "cache", "FIGURES": tmp_path / "figures"}.items(): monkeypatch.setenv(f"MUSICSSL_{name}", str(value))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HANDS", "1")
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(tmp_path / "more")])
    yield tmp_path
    sys.modules.pop("musicssl.experiments.toy", None)


def filled_by():
    """Processes that made the grid's records; every run was done once."""
    made = records.load_all(cluster.record_folder("toy", "test"))
    diary = (cluster.scratch_folder("toy", "test") / "diary.txt").read_text().split()
    assert sorted(diary) == sorted(str(record.config["seed"]) for record in made) == [str(seed) for seed in range(RUNS)]
    return {record.metrics["process"] for record in made}


def stand_ins(folder, srun):
    """A PATH with an `srun` and an `scontrol` of ours."""
    for name, text in {"srun": srun, "scontrol": f'echo "$@" >> {folder}/requeued'}.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}


def test_the_callers_number_of_threads_comes_back(book):
    (book / "settings.ini").write_text("[project]\nprofile = test\n[test]\nworkers = 1\nthreads = 3\n[test.toy]\n")
    assert {record.provenance["threads"] for record in cluster.join_grid("toy", "test")} == {3}
    assert torch.get_num_threads() == 1


def test_two_array_tasks_fill_a_grid_together(book, monkeypatch):
    monkeypatch.setenv("HANDS", "2")
    (book / "array.sh").write_text(cluster.script("toy", "test", tasks=2, gpus=0, hours=.5))
    environment = stand_ins(book, 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    tasks = [subprocess.Popen(["bash", book / "array.sh"], env=environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert len(filled_by()) == 2 and any(f"toy at test: {RUNS} done" in text for text in said) and not (book / "requeued").exists()


@pytest.mark.parametrize("gpus", [0, 1, 4])
@pytest.mark.parametrize("paper", ["toy", None])
def test_the_script_is_bash_and_its_options_come_first(book, gpus, paper):
    text = cluster.script(paper, "test", 3, gpus, 1.75)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert {f"export MUSICSSL_{name}={book / folder}" for name, folder in {"CACHE": "cache", "FIGURES": "figures", "DATASETS": "data/sets"}.items()} <= set(text.splitlines())
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --array=1-3", "#SBATCH --time=1:45:00", "#SBATCH --signal=USR1@120", "#SBATCH --requeue", f"#SBATCH --ntasks-per-node={max(1, gpus)}"} <= set(options)
    assert (f"#SBATCH --gpus-per-node={gpus}" in options) == (gpus > 0)
    first_command = next(line for line in text.splitlines() if line and not line.startswith("#"))
    assert text.index(options[-1]) < text.index(first_command), "sbatch stops reading options at the first command"


@pytest.mark.parametrize("status, requeued", [(85, True), (0, False), (1, False)])
def test_a_task_that_was_asked_to_end_is_queued_again(book, status, requeued):
    environment = stand_ins(book, f"exit {status}")
    done = subprocess.run(["bash"], input=cluster.script("toy", "test"), text=True, env=environment)
    assert done.returncode == status and (book / "requeued").exists() == requeued
    if requeued: assert (book / "requeued").read_text() == "requeue 17\n"


def signalled(book, text):
    """A task whose shell is told to end while srun is still writing its checkpoint: its status, and whether it went back into the queue."""
    environment = stand_ins(book, f"touch {book}/began; trap '' TERM; sleep 1; exit 85")
    shell = subprocess.Popen(["bash", "-c", text], env=environment)
    while not (book / "began").exists(): time.sleep(.02)
    shell.send_signal(signal.SIGTERM)
    return shell.wait(60), (book / "requeued").exists()


def test_the_shell_outlives_the_signal(book):
    assert signalled(book, cluster.script("toy", "test")) == (85, True)


def test_mutation_a_shell_that_does_not_listen(book):
    assert signalled(book, cluster.script("toy", "test").replace("trap : TERM USR1", "")) == (-signal.SIGTERM, False)


def test_submitit_on_this_machine(book, monkeypatch):
    monkeypatch.setenv("HANDS", "2")
    jobs = cluster.submit("toy", "test", "local", tasks=2, gpus=0, hours=.1)
    for job in jobs: job.result()
    assert len(filled_by()) == 2
    with pytest.raises(ValueError, match="got 2 GPUs for a task of 'local'"): cluster.submit("toy", "test", "local", gpus=2)


def test_submitit_in_this_process_from_the_command_line(book, capsys):
    assert reproduce.main(["runs", "submit", "--profile", "test", "--cluster", "debug", "--tasks", "2", "--gpus", "0"]) == 0
    assert len(filled_by()) == 1 and capsys.readouterr().out.startswith("2 tasks: ")


TASK = textwrap.dedent("""
    import os, signal, sys
    from musicssl.cluster import GridTask
    child = "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(85)); print('ready', flush=True); time.sleep(60)"
    task = GridTask([sys.executable, "-c", child])
    def wanted_back(*_):
        delayed = task.checkpoint()
        print(type(delayed).__name__, delayed.function.command == task.command, task.process.poll(), flush=True)
        os._exit(0)
    signal.signal(signal.SIGUSR2, wanted_back)
    if sys.argv[1:]: GridTask.checkpoint = lambda self: (self.process.send_signal(signal.SIGUSR1), self.process.wait())
    task()
""")


def wanted_back(*mutation):
    """What a task answers when submitit asks in the middle of its call; nothing if it hangs."""
    task = subprocess.Popen([sys.executable, "-c", TASK, *mutation], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert task.stdout.readline() == "ready\n"
        time.sleep(.3)
        task.send_signal(signal.SIGUSR2)
        return task.communicate(timeout=10 if mutation else 120)[0]
    except subprocess.TimeoutExpired: return ""
    finally:
        try: os.killpg(task.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        task.wait()


def test_a_task_of_submitit_is_wanted_back():
    assert wanted_back().startswith("DelayedSubmission True ")


def test_mutation_waiting_as_usual_in_a_signal_handler():
    """`Popen.wait` holds a lock, which the interrupted call has."""
    assert wanted_back("mutation") == ""


def test_list_says_who_is_at_what(book, capsys):
    configs, folder = cluster.grid_of("toy", "test"), cluster.record_folder("toy", "test")
    assert reproduce.main(["train", "--profile", "test", "--paper", "toy", "--seed", "1"]) == 0
    assert capsys.readouterr().out == "toy at test: 1 done, 0 running, 0 missing\n"
    with files.lock(folder / ".locks" / files.fingerprint(configs[2])): assert reproduce.main(["runs", "list", "--profile", "test"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{files.fingerprint(configs[0])}  missing  toy, seed 0" and lines[1] == f"{files.fingerprint(configs[1])}  done     toy, seed 1"
    assert lines[2].startswith(f"{files.fingerprint(configs[2])}  running  toy, seed 2 (process {os.getpid()} on ") and " since " in lines[2]
    assert lines[-1] == f"toy at test: 1 done, 1 running, {RUNS - 2} missing"


def test_workers_side_by_side(book, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(records, "fill", lambda grid, work, *folders, **how: seen.append((len(grid), work, how)))
    for words in ([], ["--workers", "3"]): assert reproduce.main(["runs", "run", "--profile", "test", *words]) == 0
    assert seen == [(RUNS, "musicssl.experiments.toy:run", {"workers": workers, "threads": 1}) for workers in (2, 3)]
    with pytest.raises(SystemExit): reproduce.main(["runs", "run", "--profile", "test", "--workers", "3", "--one-by-one"])
    assert "not allowed with argument --workers" in capsys.readouterr().err


@pytest.mark.parametrize("words, told", [
    (["train", "--paper", "toy", "--arm", "tyo"], "no run of toy at test has arm tyo; there are toy"),
    (["train", "--paper", "toy", "--seed", "9"], "no run of toy at test has seed 9; there are 0, 1"),
    (["train", "--paper", "tyo"], "there is no chapter 'tyo'"), (["runs", "script", "--profile", "tset"], "profile 'tset' is not in settings.ini")])
def test_mistakes_are_said_in_a_line(book, capsys, words, told):
    assert reproduce.main(words) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("musicssl: ") and told in said.err and said.err.count("\n") == 1


def test_submitit_that_is_not_there(book, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert reproduce.main(["runs", "submit", "--profile", "test"]) == 1
    assert "pip install 'musicssl[submitit]'" in capsys.readouterr().err


LONG = """
import sys
from musicssl import reproduce
from musicssl.experiments import clmr
grid = clmr.grid
clmr.grid = lambda profile: [{**config, "steps": 100_000} for config in grid(profile)]
sys.exit(reproduce.main(["train", "--profile", "test", "--paper", "clmr", "--arm", "clmr"]))
"""


def cache_beside(folder):
    """A cache with the corpora of the tests' cache and work in progress of its own."""
    cache, shared = folder / "cache", settings.cache_dir()
    cache.mkdir()
    for path in shared.iterdir():
        if path.name != "runs": (cache / path.name).symlink_to(path)
    return cache


def test_training_that_is_asked_to_end(tmp_path):
    """Status 85, a checkpoint at the step it was at, no record, no lock."""
    cache = cache_beside(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", LONG], stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "MUSICSSL_FIGURES": str(tmp_path), "MUSICSSL_CACHE": str(cache)})
    until = time.monotonic() + 120
    while not any(path.stat().st_size for path in cache.glob("runs/test/clmr/*/log.jsonl")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(.05)
    process.send_signal(signal.SIGUSR1)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 85, errors
    folder, = cache.glob("runs/test/clmr/*")
    assert list(folder.glob("step-*")) and not list(Path(tmp_path, "test", "records", "clmr").glob("*.json"))
    with files.lock(tmp_path / "test" / "records" / "clmr" / ".locks" / folder.name): pass
