"""Every chapter through papermill at a scale of seconds, and what happens when one of them is wrong."""
import os
import subprocess
import sys

import nbformat
import papermill
import pytest
from execnb.shell import CaptureShell
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from musicssl import files, reproduce, settings

CHAPTERS = reproduce.chapters()


class InThisProcess(Engine):
    """Papermill's way of running a notebook without a kernel: an IPython shell in this process, where the packages are in memory already."""

    @classmethod
    def execute_managed_notebook(cls, manager, kernel_name, **options):
        shell = CaptureShell()
        for index, cell in enumerate(manager.nb.cells):
            if cell.cell_type != "code": continue
            manager.cell_start(cell, index)
            done = shell.run_cell(cell.source, store_history=True) # `In` is what `check_parameters` looks at
            error = done.error_before_exec or done.error_in_exec
            if error: cell.outputs = [nbformat.v4.new_output("error", ename=type(error).__name__, evalue=str(error), traceback=[str(error)])]
            (manager.cell_exception if error else manager.cell_complete)(cell, index)
            if error: return


papermill_engines.register("in this process", InThisProcess)


def run_with(notebook, folder, parameters, engine=None):
    """A notebook through papermill, in a kernel or, quicker, in this process."""
    papermill.execute_notebook(notebook, folder / "copy.ipynb", parameters, engine_name=engine, kernel_name="python3", language="python",
                               cwd=notebook.parent, progress_bar=False)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_chapter_makes_its_figures(chapter):
    if chapter.name == "scorebox": reproduce.fill_grid(chapter.name, "test", workers=2) # each run in a process of its own, as at the other profiles
    reproduce.run_chapter(chapter, "test")
    made = settings.figures_dir("test")
    copy = nbformat.read(made / "notebooks" / chapter.notebook.name, as_version=4)
    assert not any(output.output_type == "error" for cell in copy.cells for output in cell.get("outputs", []))
    for stem in {path.stem for path in made.glob(f"{chapter.name}_*.png")}:
        assert (made / f"{stem}.csv").exists(), f"{stem}.png has no data beside it"
    assert list(made.glob(f"{chapter.name}_*.png")), "the chapter wrote no figure"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
@pytest.mark.parametrize("parameters, message", [
    ({"profile": "test", "proflie": "laptop"}, "unknown parameter 'proflie'; valid parameters are profile (str)"),
    ({"profile": 7}, "parameter profile = 7 is not str"),
    ({"profile": "lapotp"}, "profile 'lapotp' is not in settings.ini; it has test, smoke, laptop, gpu, paper"),
])
def test_wrong_parameter_stops_the_first_cell(chapter, parameters, message, tmp_path, monkeypatch):
    monkeypatch.delenv("MUSICSSL_PROFILE")
    with pytest.raises(PapermillExecutionError) as failure: run_with(chapter.notebook, tmp_path, parameters, "in this process")
    assert message in failure.value.evalue
    assert "check_parameters" in failure.value.source


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.name)
def test_lost_parameters_tag_fails_loudly(chapter, tmp_path, monkeypatch):
    monkeypatch.delenv("MUSICSSL_PROFILE")
    notebook = nbformat.read(chapter.notebook, as_version=4)
    for cell in notebook.cells: cell.metadata.pop("tags", None)
    nbformat.write(notebook, tmp_path / "untagged.ipynb")
    with pytest.raises(reproduce.NotebookFailed, match="no cell is tagged `parameters`"):
        reproduce.execute(tmp_path / "untagged.ipynb", tmp_path / "copy.ipynb", {"profile": "test"})
    for engine in ("in this process", None) if chapter == CHAPTERS[0] else ("in this process",): # as the test above runs it; one chapter also in a kernel
        with pytest.raises(PapermillExecutionError, match="lost its `parameters` tag"):
            run_with(tmp_path / "untagged.ipynb", tmp_path, {"profile": "smoke"}, engine)


@pytest.fixture
def small_book(tmp_path, monkeypatch):
    """A project of two chapters without training: the first can be told to fail, the second always works."""
    (tmp_path / "nbs" / "papers").mkdir(parents=True)
    (tmp_path / "settings.ini").write_text("[project]\nprofile = test\n[test]\nworkers = 1\nthreads = 1\n[test.first]\n[test.second]\n")
    (tmp_path / "constraints.txt").write_text("")
    for number, name in enumerate(("first", "second"), 1):
        module = tmp_path / "extra" / "musicssl" / "experiments"
        module.mkdir(parents=True, exist_ok=True)
        (module / f"{name}.py").write_text("def prepare(profile): pass\ndef grid(profile): return []\ndef run(config, folder): pass\n")
        cells = [f"#| default_exp experiments.{name}", "profile: str = 'test'",
                 f"import os\nfrom pathlib import Path\nPath(os.environ['COUNT'], '{name}').open('a').write('x')",
                 f"if '{name}' == os.environ.get('BREAK'): raise RuntimeError('told to fail')"]
        cells = [nbformat.v4.new_code_cell(text) for text in cells]
        cells[1].metadata["tags"] = ["parameters"]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "nbs" / "papers" / f"{number}_{name}.ipynb")
    return tmp_path


def reproduce_small(book, **environment):
    """`musicssl reproduce` on the small book in a process of its own: its exit status and what it printed."""
    program = ("import sys, musicssl.experiments as e; e.__path__.append(sys.argv[1]); "
               "from musicssl.reproduce import main; sys.exit(main(['reproduce', '--profile', 'test']))")
    environment = {**os.environ, "MUSICSSL_ROOT": str(book), "MUSICSSL_FIGURES": str(book / "figures"),
                   "MUSICSSL_CACHE": str(book / "cache"), "COUNT": str(book), **environment}
    done = subprocess.run([sys.executable, "-c", program, str(book / "extra/musicssl/experiments")], cwd=book, env=environment,
                          capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def times_run(book): return {name: len((book / name).read_text()) for name in ("first", "second")}


def test_failing_chapter_is_named_the_rest_is_kept_and_resumed_and_a_changed_one_run_again(small_book):
    status, said = reproduce_small(small_book, BREAK="first")
    assert status == 1
    assert "1_first.ipynb, cell" in said and "RuntimeError: told to fail" in said
    copies = small_book / "figures" / "test" / "notebooks"
    assert (copies / "1_first.failed.ipynb").exists() and not (copies / "1_first.ipynb").exists()
    assert (copies / "2_second.ipynb").exists()

    status, said = reproduce_small(small_book)
    assert status == 0, said
    assert (copies / "1_first.ipynb").exists() and not (copies / "1_first.failed.ipynb").exists()
    assert times_run(small_book) == {"first": 2, "second": 1}, "the second call repeats what failed, and only that"

    path = small_book / "nbs" / "papers" / "2_second.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("1 + 1"))
    nbformat.write(notebook, path)
    assert reproduce_small(small_book)[0] == 0
    assert times_run(small_book) == {"first": 2, "second": 2}, "a changed notebook is run again, and only that"


def test_two_calls_at_one_profile_do_not_meet(small_book):
    with files.lock(small_book / "figures" / "test" / ".locks" / "reproduce"):
        status, said = reproduce_small(small_book)
    assert status == 1 and "musicssl: " in said and not (small_book / "first").exists()


def test_a_dead_kernel_is_a_failure_with_a_name(tmp_path):
    cells = [nbformat.v4.new_code_cell("profile: str = 'test'"), nbformat.v4.new_code_cell("import os; os._exit(1)")]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "dies.ipynb")
    with pytest.raises(reproduce.NotebookFailed, match="dies.ipynb, .*[Kk]ernel"):
        reproduce.execute(tmp_path / "dies.ipynb", tmp_path / "copy.ipynb", {"profile": "test"})
    assert (tmp_path / "copy.failed.ipynb").exists() and not (tmp_path / "copy.ipynb").exists()
