"""Every notebook runs from top to bottom: one case each, through nbdev's own runner."""
from pathlib import Path

import pytest
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook(notebook):
    passed, _ = run_notebook(ROOT / "nbs" / notebook, basepath=ROOT)
    assert passed, f"{notebook} failed; the cell and its error stand above"
