"""The rooms of the house: arrows run one way, torchaudio has one door, and coming in is quick (P20)."""
import json
import subprocess
import sys

import pytest

from imports_of import PACKAGE, all_imports, rooms

# A room imports only from rooms above it.
ORDER = ["settings", "files", "checkpoint", "compat", "audio",
         "features.mel", "features.spectral", "features.cqt", "features.rhythm", "features.frames", "features.targets",
         "data.notation", "data.abc", "data.scores", "data.sampler", "data.store", "data.arrange", "data.deal", "data.scorebox",
         "data.captions", "data.notes", "data.folder", "data.magnatagatune", "data.shards", "data.corpora", "data.codes", "data.loader",
         "augment.base", "augment.linear", "augment.pitch", "augment.distortions", "augment.mixture", "augment.clmr",
         "encoders.base", "encoders.samplecnn", "encoders.handmade", "encoders.transformer", "encoders.frames", "encoders.pase", "encoders.framewise",
         "encoders.musicnn", "encoders.text", "encoders.mert", "objectives.clmr", "objectives.supervised", "objectives.musicoder", "objectives.workers",
         "objectives.weighting", "objectives.multitask", "objectives.coattention", "objectives.mulap", "objectives.mert",
         "optim", "devices", "teachers.rvq", "teachers.codec", "teachers.kmeans", "zoo", "meter", "update", "train",
         "probe.metrics", "probe.intervals", "probe.frozen", "probe.logistic", "probe.readouts", "probe.beats", "probe.tasks", "probe.finetune",
         "probe.robustness", "probe.filters", "records", "report", "evaluate", "tag",
         "experiments.floors", "experiments.scorebox", "experiments.clmr", "experiments.musicoder", "experiments.multitask",
         "experiments.mulap", "experiments.mert", "experiments.clmr_choices", "experiments.clmr_inside", "cluster", "reproduce"]
# What networks and objectives are made of; apart from these, they do not know each other.
PARTS = {"encoders.base", "encoders.transformer", "encoders.text", "objectives.workers", "objectives.weighting", "objectives.coattention", "experiments.clmr"}
# Rooms that know no paper: no network, objective or experiment may enter, only the contract of an encoder.
PAPERLESS = {"optim", "devices", "checkpoint", "teachers.rvq", "teachers.codec", "teachers.kmeans", "zoo", "meter", "update", "train", "records", "report",
             *(f"probe.{room}" for room in ("metrics", "intervals", "frozen", "logistic", "readouts", "beats", "tasks", "finetune", "robustness", "filters"))}
# Rooms for reading and drawing; everything else is for training and stays light.
DRAWING = {"report", "reproduce"}
HEAVY = ["torchaudio", "librosa", "matplotlib", "seaborn", "pandas", "IPython", "music21", "pretty_midi", "webdataset", "nbdev", "papermill"]


def within(name):
    """The room a dotted name points to, or nothing when it is of another package."""
    known, inner = set(rooms()), name.removeprefix("musicssl.")
    if not name.startswith("musicssl."): return None
    return next((inner.rsplit(".", cut)[0] for cut in range(inner.count(".") + 1) if inner.rsplit(".", cut)[0] in known), None)


def test_every_room_has_its_place():
    unplaced = sorted(set(rooms()) - set(ORDER))
    assert not unplaced, f"rooms without a place in ORDER: {unplaced}; say between which rooms they stand"


def test_arrows_run_one_way():
    place = {room: number for number, room in enumerate(ORDER)}
    against = [f"{room}, line {imported.line}: imports {target}" for room, found in all_imports().items() for imported in found
               if (target := within(imported.name)) and target in place and room in place and place[target] >= place[room]]
    assert not against, "imports from a room below, or from itself:\n" + "\n".join(against)


def test_rooms_without_a_paper():
    known = [f"{room}, line {imported.line}: imports {target}" for room, found in all_imports().items() if room in PAPERLESS for imported in found
             if (target := within(imported.name)) and target.split(".")[0] in ("encoders", "objectives", "experiments") and target != "encoders.base"]
    assert not known, "rooms that should know no paper:\n" + "\n".join(known)


def test_networks_and_objectives_do_not_know_each_other():
    siblings = [f"{room}, line {imported.line}: imports {target}" for room, found in all_imports().items() for imported in found
                if (target := within(imported.name)) and target != room and target not in PARTS
                and room.split(".")[0] in ("encoders", "objectives", "experiments") and target.split(".")[0] == room.split(".")[0]]
    assert not siblings, "one file per network, objective and experiment:\n" + "\n".join(siblings)


def test_only_compat_opens_torchaudio():
    intruders = [f"{room}, line {imported.line}" for room, found in all_imports().items() for imported in found
                 if imported.name.split(".")[0] == "torchaudio" and room != "compat"]
    assert not intruders, f"torchaudio is imported outside musicssl.compat: {intruders}"


def test_the_rules_see_what_they_forbid(tmp_path):
    """Absolute, relative, late and dynamic imports are all found."""
    (tmp_path / "data").mkdir()
    (tmp_path / "train.py").write_text("")
    (tmp_path / "data" / "store.py").write_text(
        "import torchaudio.functional as F\nfrom ..train import fit\nfrom musicssl import train\nimport numpy\n"
        "def late():\n    import pandas\n    importlib.import_module('torchaudio')\nif TYPE_CHECKING:\n    import librosa\n")
    found = {(imported.name, imported.at_top) for imported in all_imports(tmp_path)["data.store"]}
    assert found == {("torchaudio.functional", True), ("musicssl.train", True), ("numpy", True), ("pandas", False), ("torchaudio", False), ("librosa", False)}


def run(code):
    """What a fresh process prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_training_room_brings_heavy_packages():
    """After importing everything but the drawing rooms, none of these is in memory, unless a dependency brings it by itself."""
    names = ["musicssl", *(f"musicssl.{room}" for room in rooms() if room not in DRAWING)]
    code = "import importlib, json, sys, lightning_fabric, sklearn.linear_model\n" \
           f"watched, by = set({HEAVY!r}) - set(sys.modules), {{}}\n" \
           f"for name in {names!r}:\n    importlib.import_module(name)\n" \
           "    for heavy in watched & set(sys.modules): by.setdefault(heavy, name)\n" \
           "print(json.dumps(by))"
    brought = run(code)
    assert not brought, f"heavy package -> the room that first brings it: {brought}"


@pytest.mark.parametrize("modules", [["musicssl"], ["musicssl.encoders.samplecnn", "musicssl.objectives.clmr"]], ids=["package", "objective"])
def test_import_is_quick(modules):
    """P20: at most 1.3 times `import torch` in processor time, best of up to seven interleaved rounds in fresh processes."""
    def seconds(names):
        return run(f"import time; start = time.process_time(); import {', '.join(names)}; print(time.process_time() - start)")
    ours, torch = float("inf"), float("inf")
    for _ in range(7):
        ours, torch = min(ours, seconds(["torch", *modules])), min(torch, seconds(["torch"]))
        if ours <= 1.3 * torch: break
    assert ours <= 1.3 * torch, f"import {', '.join(modules)}: {ours:.2f} s with torch, torch alone {torch:.2f} s"
