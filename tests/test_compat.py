"""R24: torchaudio's compiled part missing or broken. Every case runs in a process of its own, so that no import lingers."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import musicssl

PACKAGE = Path(musicssl.__file__).parent

BREAK = """
import importlib.abc, sys
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchaudio._extension": raise OSError("libcudart.so.13: cannot open shared object file")
sys.meta_path.insert(0, Broken())
"""


def python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def succeeds(code, **environment):
    done = python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fake_torchaudio(folder, files):
    for name, text in files.items():
        (folder / "torchaudio" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "torchaudio" / name).write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(PACKAGE.parent)])}


def test_the_injected_fault_breaks_a_plain_import():
    done = python(BREAK + "import torchaudio")
    assert done.returncode != 0 and "libcudart" in done.stderr


def test_mfcc_and_resampling_survive_a_broken_compiled_part():
    succeeds(BREAK + """
import librosa, numpy as np, torch
from musicssl import compat
from musicssl.audio import resample_on_device
from musicssl.features import MFCC
assert not compat.has_compiled_part()
sine = lambda rate: torch.sin(2 * torch.pi * 440 * torch.arange(rate) / rate) * torch.hann_window(rate)
assert (resample_on_device(sine(16000), 16000, 8000) - sine(8000)).abs().max() < 1e-3
wave = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)) * .1
ours = MFCC(8000, n_mfcc=13, n_fft=512, hop=128, n_mels=32)(wave)
theirs = librosa.feature.mfcc(y=wave.numpy(), sr=8000, n_mfcc=13, n_fft=512, hop_length=128, n_mels=32)
assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)
""")


def test_what_needs_the_compiled_part_names_the_cure():
    succeeds(BREAK + """
from musicssl import compat
audio = compat.torchaudio()
for name in ("forced_align", "rnnt_loss"):
    try: getattr(audio.functional, name)()
    except ImportError as error: assert "pip install" in str(error) and "libcudart" in str(error), error
    else: raise AssertionError(name)
""")


def test_a_healthy_torchaudio_is_left_alone(tmp_path):
    environment = fake_torchaudio(tmp_path, {
        "__init__.py": "from . import _extension, functional", "functional.py": "forced_align = 'the real one'",
        "_extension.py": "_IS_TORCHAUDIO_EXT_AVAILABLE = True"})
    succeeds("""
from musicssl import compat
assert compat.torchaudio().functional.forced_align == "the real one" and compat.has_compiled_part()
""", **environment)


@pytest.mark.parametrize("code, match", [
    ("import sys; sys.modules['torchaudio'] = None", "not installed"),
    ("", "even without its compiled part")], ids=["missing", "beyond help"])
def test_a_hopeless_torchaudio_names_the_cure(tmp_path, code, match):
    environment = fake_torchaudio(tmp_path, {"__init__.py": "raise AttributeError('torch has no attribute x')"})
    done = python(code + "\nfrom musicssl import compat\ncompat.torchaudio()", **environment)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and match in last and "pip install" in last


def test_no_other_module_imports_torchaudio():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] == "torchaudio" for name in names), path


def test_importing_every_room_leaves_torchaudio_alone():
    succeeds("""
import importlib, pkgutil, sys
import musicssl
for room in pkgutil.walk_packages(musicssl.__path__, "musicssl."):
    if room.name != "musicssl.__main__": importlib.import_module(room.name)
assert not [name for name in sys.modules if name.split(".")[0] == "torchaudio"]
""")
