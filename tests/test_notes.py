"""Single notes: the list and the hash that say it has not changed, the sound, and building across processes."""
import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from musicssl.data import notes as single
from musicssl.data import scorebox
from musicssl.data.notes import FAMILIES, LEFT_OUT, NEW_TIMBRE, audition, hear, load, make_notes, plan_notes, recordings, sound_report
from musicssl.data.scorebox import SPLITS
from musicssl.data.sampler import Sampler, SoundFont
from musicssl.data.store import CorruptStore, StoreWriter, UnfinishedStore

needs_data = pytest.mark.skipif(importlib.util.find_spec("pretty_midi") is None, reason='needs pip install "musicssl[data]"')
SMALL = {"step": 12, "seconds": 1.} # 415 notes: the smallest set there is
KEPT = [program for programs in FAMILIES.values() for program in programs]


def digest(rows) -> str:
    """One hash for some label rows."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def notes(cache):
    return load(**SMALL, cache=cache, workers=1, progress=False)


# The list of notes

PLANS = {(3, 0): "b7267afd7918ad0c", (1, 0): "d37be2ecb45896de", (3, 1): "b0234159434582e5"}


def test_the_list_has_not_changed():
    assert {key: digest(plan_notes(*key)) for key in PLANS} == PLANS
    assert len(plan_notes()) == 1_411 and len(plan_notes(1)) == 4_067


def test_another_environment_makes_the_same_list():
    code = "import hashlib, json\nfrom musicssl.data.notes import plan_notes\n" \
           "print(hashlib.sha256(json.dumps(plan_notes(), sort_keys=True).encode()).hexdigest()[:16])"
    env = os.environ | {"PYTHONHASHSEED": "4711", "LC_ALL": "C", "OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == PLANS[3, 0], done.stderr


def leaks(rows) -> set:
    """Programs on both sides of the held-out split."""
    held_out = {row["program"] for row in rows if row["split"] == "test_newtimbre"}
    known = {row["program"] for row in rows if row["split"] != "test_newtimbre"}
    return held_out & known | held_out ^ {p for programs in NEW_TIMBRE.values() for p in programs}


def test_held_out_programs_stay_out(monkeypatch):
    """Mutation: notes of held-out programs dealt to all splits."""
    rows = plan_notes(1)
    assert not leaks(rows) and {row["split"] for row in rows} == set(SPLITS)
    assert all({row["split"] for row in rows if row["family"] == family} == set(SPLITS) for family in FAMILIES)
    monkeypatch.setattr(single, "split_of", lambda number: "test_newtimbre" if number % 128 < 50 else "train")
    assert leaks(plan_notes(1))


def test_shares_of_the_splits():
    known = [row["split"] for row in plan_notes(1) if row["split"] != "test_newtimbre"]
    assert [round(known.count(split) / len(known), 1) for split in ("train", "valid", "test")] == [.7, .1, .2]
    assert all(row["split"] == full["split"] for row, full in zip(plan_notes(1, seed=5), plan_notes(1)))


@needs_data
def test_nothing_new_was_heard_in_training():
    """Held-out programs share no recording with a program of the training set, pads aside. Mutation: Piano 2 held out, which plays Piano 1's."""
    font = SoundFont()

    def shared(program):
        held_out = {p for programs in NEW_TIMBRE.values() for p in programs} | {program}
        return [p for p in KEPT if p not in held_out and recordings(font, p) & recordings(font, program)]

    assert {family for family, programs in NEW_TIMBRE.items() for p in programs if shared(p)} == {"synth_pad"}
    assert shared(1) == [0, 2, 3]


# The programs

@needs_data
def test_every_key_has_a_sound():
    font = SoundFont()
    silent = {program: [key for key in range(36, 85) if not any(zone.keys[0] <= key <= zone.keys[1] for zone in font.presets[0, program].zones)]
              for program in range(96)}
    assert {program: keys for program, keys in silent.items() if keys} == {65: [64], 67: [80, 81, 82, 83, 84], 78: [79, 80, 81, 82, 83, 84]}
    assert all(font.zones(0, program, key, velocity) for program in KEPT for key in (36, 60, 84) for velocity in single.VELOCITIES)


@needs_data
def test_kept_programs_are_in_tune():
    """At keys the notebook does not try. Mutation: a sampler that plays a quarter tone too high."""
    sampler = Sampler(oversample=1)
    tried = [audition(program, sampler, range(37, 85, 6)) for program in KEPT]
    assert max(a["cents"] for a in tried) < 25 and max(a["offset"] for a in tried) < .5 and min(a["level"] for a in tried) > -60
    play, sampler.render = sampler.render, lambda rows, n: play([(*rows[0], 1., 0., 50.)], n)
    assert min(audition(program, sampler, (49, 73))["cents"] for program in KEPT) > 25


@needs_data
def test_left_out_programs_have_their_faults():
    sampler = Sampler(oversample=1)
    cents = {program: audition(program, sampler, keys)["cents"] for program, keys in
             {9: (46, 47, 48, 60), 14: (60, 72, 84), 55: (48, 60), 76: (77, 84), 77: (36, 45), 78: (36, 60), 86: (54, 60)}.items()}
    assert set(cents) < set(LEFT_OUT) and min(cents.values()) > 25
    assert all(audition(program, sampler, (62,))["offset"] > .5 for program in (38, 65, 87))


# The sound

@needs_data
def test_the_labels_have_not_changed(notes):
    assert digest(notes.labels) == "cf753f50367c2a3a"
    assert [row | {"name": label["name"]} for row, label in zip(plan_notes(12), notes.labels)] == notes.labels


@needs_data
def test_the_columns_say_what_the_labels_say(notes):
    assert len(notes) == 415 == sum(len(notes.ids(split)) for split in SPLITS) and notes.wave([0, 414]).shape == (2, 22_050)
    row = notes.labels[200]
    assert notes.families[notes.family[200]] == row["family"]
    assert all(getattr(notes, name)[200] == row[name] for name in ("pitch", "program", "velocity", "split"))
    assert notes.table().loc[row["note_id"], "name"] == SoundFont().presets[0, row["program"]].name


@needs_data
def test_the_sound_is_what_the_label_says(notes, monkeypatch):
    """Mutation: all labels one semitone too high."""
    sound = sound_report(notes)
    assert sound.cents.abs().max() < 50 and -60 < sound.peak.min() and sound.peak.max() < 0
    monkeypatch.setattr(notes, "labels", [row | {"pitch": row["pitch"] + 1} for row in notes.labels])
    assert (sound_report(notes).cents.abs() < 50).mean() < .35


@needs_data
def test_velocity_is_loudness_and_a_note_dies_away():
    row = next(row for row in plan_notes(1) if row["program"] == 71 and row["pitch"] == 60)
    soft, loud = make_notes([row | {"velocity": 50}, row | {"velocity": 100}], 2., 22_050).astype(float)
    assert abs(np.abs(loud).max() / np.abs(soft).max() - 4) < .01
    assert np.abs(loud[31_000:33_000]).max() > 1_000 and np.abs(loud[-2_000:]).max() < 10
    assert abs(hear(loud / 32768, 22_050, 60)["cents"]) < 10


@needs_data
def test_no_note_clips(monkeypatch):
    """Mutation: five times the gain."""
    loudest = [row | {"velocity": 127} for row in plan_notes(6) if row["program"] in (39, 60, 94)]
    assert np.abs(make_notes(loudest, 1., 22_050).astype(int)).max() < 32_700
    monkeypatch.setattr(single, "GAIN", 4.)
    with pytest.raises(ValueError, match="of full scale, wanted below 1"): make_notes(loudest, 1., 22_050)


# The folder

@needs_data
def test_processes_make_the_same_set(notes, tmp_path):
    script = tmp_path / "make.py"
    script.write_text("import sys\nfrom musicssl.data import notes\nif __name__ == '__main__':\n"
                      "    print(notes.load(12, 1., cache=sys.argv[1], workers=2, progress=False).fingerprint)\n")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == notes.fingerprint, done.stderr
    other = single.Notes(tmp_path / "notes" / notes.fingerprint)
    assert other.labels == notes.labels
    assert max(np.abs(other.store[i].astype(int) - notes.store[i]).max() for i in range(415)) <= 2


@needs_data
def test_a_script_without_guard_is_told(tmp_path, monkeypatch):
    """The folder is locked by the parent, and the child would wait for ever. Mutation: the process looks like any other, and builds."""
    monkeypatch.setattr(single, "render", lambda *how: (_ for _ in ()).throw(LookupError("built")))
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(RuntimeError, match="if __name__ == '__main__'"): load(cache=tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", False, raising=False)
    with pytest.raises(LookupError, match="built"): load(cache=tmp_path)


@needs_data
def test_an_interrupted_set_goes_on(notes, tmp_path, monkeypatch):
    """Mutation: nothing on the disk is remembered, and all is played again."""
    played, names = [], [row["note_id"] for row in notes.labels]

    def play(rows, *how):
        if stumbling and played: raise KeyboardInterrupt
        played.extend(row["note_id"] for row in rows)
        return make_notes(rows, *how)

    monkeypatch.setattr(single, "make_notes", play)
    stumbling = True
    with pytest.raises(KeyboardInterrupt): load(**SMALL, cache=tmp_path, workers=1, progress=False)
    with pytest.raises(UnfinishedStore, match="stopped after 1 chunk"): single.Notes(tmp_path / "notes" / notes.fingerprint)
    stumbling = False
    forgetful = shutil.copytree(tmp_path / "notes", tmp_path / "other" / "notes").parent
    whole = load(**SMALL, cache=tmp_path, workers=1, progress=False)
    assert played == names and whole.labels == notes.labels
    assert all(np.array_equal(whole.store[i], notes.store[i]) for i in range(0, 415, 7))
    monkeypatch.setattr(StoreWriter, "missing", lambda self: [0, 1, 2, 3])
    with pytest.raises(UnfinishedStore): load(**SMALL, cache=forgetful, workers=1, progress=False)
    assert played == names + names


@needs_data
@pytest.mark.parametrize("locked", [True, False], ids=["lock", "mutation: no lock"])
def test_two_who_want_the_same_set_make_it_once(notes, tmp_path, monkeypatch, locked):
    made = []

    def slow(folder, *rest):
        made.append(folder)
        time.sleep(.4)
        shutil.copytree(notes.folder, folder, dirs_exist_ok=True)

    monkeypatch.setattr(single, "render", slow)
    if not locked: monkeypatch.setattr(single.files, "lock", lambda *how, **options: contextlib.nullcontext())
    callers = [threading.Thread(target=load, kwargs=SMALL | {"cache": tmp_path, "progress": False}) for _ in range(2)]
    for caller in callers: caller.start()
    for caller in callers: caller.join()
    assert len(made) == (1 if locked else 2)


@needs_data
def test_damage_is_found(notes, tmp_path, monkeypatch):
    """Mutation: labels read without their checksum pass."""
    folder = shutil.copytree(notes.folder, tmp_path / notes.fingerprint)
    chunk = bytearray((folder / "00001.int16").read_bytes())
    chunk[1000] ^= 1
    (folder / "00001.int16").write_bytes(chunk)
    with pytest.raises(CorruptStore, match="chunk 1 has changed"): single.Notes(folder).wave([200])
    changed = [row | {"pitch": 60} for row in notes.labels]
    single.write_labels(folder, changed)
    with pytest.raises(CorruptStore, match="labels.json.gz is missing or has changed"): single.Notes(folder)
    monkeypatch.setattr(scorebox, "zlib", SimpleNamespace(crc32=lambda packed: notes.store.meta["labels_crc32"]))
    assert single.Notes(folder).labels == changed


@needs_data
def test_other_rates(notes, cache):
    small = load(**SMALL, sample_rate=8_000, cache=cache, progress=False)
    assert small.labels == notes.labels and small.wave([0, 414]).shape == (2, 8_000) and small.fingerprint != notes.fingerprint
    assert small.store.meta["derived_from_hz"] == 22_050 and sound_report(small, range(0, 415, 10)).cents.abs().max() < 50
    wide = make_notes(plan_notes(12)[:3], 1., 24_000)
    assert wide.shape == (3, 24_000) and all(abs(hear(wave / 32768, 24_000, 36 + 12 * i)["cents"]) < 10 for i, wave in enumerate(wide))


@needs_data
def test_another_recipe_is_another_folder(notes, tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(single, "Notes", folders.append)
    monkeypatch.setattr(single, "render", lambda *how: None)
    monkeypatch.setattr(single, "derive_rate", lambda *how: None)
    for change in ({}, {"step": 6}, {"seconds": 2.}, {"seed": 1}, {"sample_rate": 24_000}): load(**SMALL | change, cache=tmp_path)
    monkeypatch.setattr(single, "VERSION", 2)
    load(**SMALL, cache=tmp_path)
    assert len(set(folders)) == 6 and folders[0].name == notes.fingerprint


def test_without_the_data_package(tmp_path, monkeypatch):
    """A finished set opens without the soundfont; a new one says what to install."""
    real = importlib.util.find_spec
    monkeypatch.setattr("musicssl.data.sampler.importlib.util.find_spec", lambda name, *more: None if name == "pretty_midi" else real(name, *more))
    with pytest.raises(FileNotFoundError, match=r'pip install "musicssl\[data\]"'): load(**SMALL, cache=tmp_path, progress=False)


@needs_data
def test_a_finished_set_needs_no_data_package(notes, cache, monkeypatch):
    monkeypatch.setattr("musicssl.data.sampler.soundfont_path", lambda: pytest.fail("the soundfont was asked for"))
    assert load(**SMALL, cache=cache, progress=False).labels == notes.labels


@pytest.mark.parametrize("wrong, message", [
    ({"sample_rate": 44_100}, "got 44100 Hz, single notes come in 8000, 16000, 22050, 24000 Hz"), ({"seconds": .9}, "got 0.9 s, wanted 1 s or more"),
    ({"step": 0}, "got a step of 0 semitones"), ({"step": -3}, "got a step of -3"), ({"step": 2.5}, "got a step of 2.5"),
    ({"step": 13}, "whole number from 1 to 12")])
def test_refusals(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message): load(**wrong, cache=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


@needs_data
def test_there_is_no_such_split(notes):
    with pytest.raises(ValueError, match="got split 'dev', wanted train, valid, test, test_newtimbre"): notes.ids("dev")
