"""Any folder of audio: faults R5 to R9, R14 and R26 through the folder's own path, tables of labels, and the command line."""
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile as sf

from musicssl import files
from musicssl.audio import TooManyBadFiles, read
from musicssl.data import folder as room
from musicssl.data import store as store_room
from musicssl.data.folder import (AudioFolder, BadTable, Labels, cache_listing, check, decode, describe, find_files, find_in_cache, label_rows,
                                  prepare, prepare_files, read_table, summary)
from musicssl.data.store import CorruptStore, UnfinishedStore

RATE = 8000


def noise(seconds, seed=0, rate=22050): return (.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))).astype(np.float32)


@pytest.fixture
def music(tmp_path):
    """Six good files of different lengths and formats, in two folders."""
    for i, name in enumerate(("b/1.wav", "b/2.flac", "b/3.ogg", "a/4.mp3", "a/5.wav", "a/6.flac")):
        (tmp_path / "music" / name).parent.mkdir(parents=True, exist_ok=True)
        sf.write(tmp_path / "music" / name, np.stack([noise(1 + i / 2, i)] * (1 + i % 2), 1), 22050)
    return tmp_path / "music"


def ready(music, out=None, **options):
    return prepare(music, out or music.parent / "out", **dict(sample_rate=RATE, workers=1, progress=False) | options)


def contents(folder): return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


# Files and sound

def test_rows_are_the_sorted_files(music):
    (music / ".hidden.wav").touch(); (music / "a" / "._5.wav").touch(); (music / ".trash").mkdir(); shutil.copy(music / "b/1.wav", music / ".trash")
    (music / "notes.txt").write_text("…")
    attic = ready(music)
    assert attic.clip_id == ["a/4.mp3", "a/5.wav", "a/6.flac", "b/1.wav", "b/2.flac", "b/3.ogg"] and len(attic) == 6
    for i, name in enumerate(attic.clip_id):
        wave = read(music / name, RATE)
        assert np.array_equal(attic.store[i], room.to_int16(wave.numpy())) and attic.seconds[i] == len(wave) / RATE
    assert attic.wave([0, 1], [100, 7], 900).shape == (2, 900)


def test_names_do_not_depend_on_how_a_machine_writes_accents(tmp_path):
    for name in ("cafe\u0301.wav", "cafz.wav"): sf.write(tmp_path / name, noise(1), 22050)
    assert list(find_files(tmp_path)) == ["cafz.wav", "caf\u00e9.wav"]


def test_a_folder_without_sound_says_what_it_holds(tmp_path):
    (tmp_path / "a.m4a").touch()
    with pytest.raises(FileNotFoundError, match="no sound file in .*: it holds 1 .m4a; wanted one of .*[.]flac"): find_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"): find_files(tmp_path / "none")


@pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "ogg"])
def test_pieces_of_a_long_recording_join_without_a_seam(tmp_path, monkeypatch, ending):
    sf.write(tmp_path / f"long.{ending}", noise(9.7, rate=44100), 44100)
    whole, peak, _ = decode(tmp_path / f"long.{ending}", RATE)
    monkeypatch.setattr(room, "PIECE", 2)
    pieces, same_peak, _ = decode(tmp_path / f"long.{ending}", RATE)
    assert np.abs(pieces.astype(int) - whole).max() <= 1 and same_peak == pytest.approx(peak, abs=1e-6)


def test_overshoot_is_turned_down_and_counted(music):
    loud = 2.5 * np.sin(2 * np.pi * 440 * np.arange(22050) / 22050)
    sf.write(music / "a/loud.wav", loud, 22050, subtype="FLOAT")
    attic = ready(music)
    i = attic.clip_id.index("a/loud.wav")
    kept, ideal = attic.wave([i])[0].numpy(), np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert np.abs(kept - ideal)[100:-100].max() < .01, "clipping would flatten the crests"
    assert attic.facts[i]["peak"] == pytest.approx(2.5, rel=.01)
    assert "turned down 1 that overshot full scale, by up to" in summary(attic)


# R5, R6, R9 and the quarantine

def add_faults(music):
    data = bytearray((music / "b/2.flac").read_bytes())
    data[len(data) // 2:len(data) // 2 + 3000] = np.random.default_rng(0).bytes(3000)
    (music / "c").mkdir()
    (music / "c/scratched.flac").write_bytes(data)
    mp3 = (music / "a/4.mp3").read_bytes()
    (music / "c/cut.mp3").write_bytes(mp3[:len(mp3) // 2])
    wav = (music / "a/5.wav").read_bytes()
    (music / "c/cut.wav").write_bytes(wav[:len(wav) // 2])
    (music / "c/letter.wav").write_text("Dear listener, this is not audio.")
    (music / "c/empty.mp3").touch()
    sf.write(music / "c/nan.wav", np.where(np.arange(9000) == 4000, np.nan, noise(1)[:9000]), 22050, subtype="FLOAT")
    sf.write(music / "c/silent.wav", np.zeros(22050), 22050)


FAULTS = {"c/cut.mp3": "TruncatedAudio", "c/cut.wav": "TruncatedAudio", "c/empty.mp3": "UnreadableAudio", "c/letter.wav": "UnreadableAudio",
          "c/nan.wav": "NotFiniteAudio", "c/scratched.flac": "UnreadableAudio"}


def test_every_fault_is_a_row_of_length_zero_that_ids_leave_out(music):
    """R5, R6, R7."""
    add_faults(music)
    attic = ready(music, bad=.5)
    told = {name: fact["problem"] for name, fact in zip(attic.clip_id, attic.facts) if fact["problem"]}
    assert told == FAULTS | {"c/silent.wav": "silent"}
    assert [attic.clip_id[i] for i in range(13) if attic.store.lengths[i] == 0] == sorted(FAULTS)
    used = [attic.clip_id[i] for i in attic.ids()]
    assert len(used) == 7 and "c/silent.wav" in used and not set(used) & set(FAULTS)
    assert sorted(np.concatenate([attic.ids(split) for split in room.SPLITS])) == attic.ids().tolist()
    listed = files.read_json(attic.folder / "quarantine.json")
    assert listed["counts"] == {"NotFiniteAudio": 1, "TruncatedAudio": 2, "UnreadableAudio": 3, "silent": 1} and listed["seen"] == 13


def test_mutation_without_the_faults_the_rows_would_hold_something(music, monkeypatch):
    """A reader that takes whatever it is given: the cut file then becomes a track, and the test above would notice."""
    add_faults(music)
    fact = {"seconds": 1., "rate": 22050, "channels": 1, "format": "", "peak": 0., "problem": "", "detail": ""}
    anything = lambda path, rate: (sf.read(path, dtype="int16")[0] if path.name == "cut.wav" else np.ones(9, np.int16), .5, False)
    monkeypatch.setattr(room, "look", lambda path, min_seconds=0.: fact)
    monkeypatch.setattr(room, "decode", anything)
    attic = ready(music)
    assert attic.store.lengths[attic.clip_id.index("c/cut.wav")] > 9 and attic.ids().size == 13


def test_the_limit_stops_the_build_and_keeps_the_list(music, monkeypatch):
    add_faults(music)
    decoded = []
    monkeypatch.setattr(room, "decode", lambda path, rate: decoded.append(path) or decode(path, rate))
    said = r"3 of 13 files are bad \(1 TruncatedAudio, 2 UnreadableAudio\), wanted at most 1.00%.*The list is in .*--bad"
    with pytest.raises(TooManyBadFiles, match=said): ready(music)
    assert not decoded, "headers alone already say too much is broken"
    with pytest.raises(TooManyBadFiles, match=r"bad .*wanted at most 30.00% broken"): ready(music, bad=.3)
    assert decoded and files.read_json(music.parent / "out" / "quarantine.json")["counts"]["TruncatedAudio"] == 2
    with pytest.raises(UnfinishedStore): AudioFolder(music.parent / "out")
    before = len(decoded)
    with pytest.raises(TooManyBadFiles): ready(music, bad=.3)
    assert len(decoded) <= before + 1, "what is known to be broken is not decoded again before stopping"
    assert ready(music, bad=.5).ids().size == 7


def test_too_short_tracks_are_dropped_and_all_short_is_an_error(music):
    """R9."""
    attic = ready(music, min_seconds=2.2)
    assert [attic.clip_id[i] for i in attic.ids()] == ["a/4.mp3", "a/5.wav", "a/6.flac"]
    assert "left out    3 TooShortAudio" in summary(attic)
    with pytest.raises(TooManyBadFiles, match=r"6 of 6 files are bad \(6 TooShortAudio\).* a good one left.*wanted at least 60"):
        ready(music, music.parent / "long", min_seconds=60.)
    sf.write(music / "a/none.wav", np.zeros(0), 22050)
    assert ready(music, music.parent / "zero").facts[3]["problem"] == "TooShortAudio"


# Opening, resuming, damage

def test_an_unchanged_folder_opens_at_once_and_a_changed_one_is_made_anew(music, monkeypatch):
    monkeypatch.setenv("MUSICSSL_CACHE", str(music.parent / "cache"))
    first = prepare(music, workers=1, progress=False)
    monkeypatch.setattr(room, "build", lambda *_: pytest.fail("built again"))
    assert prepare(music, workers=1, progress=False).fingerprint == first.fingerprint
    monkeypatch.undo()
    monkeypatch.setenv("MUSICSSL_CACHE", str(music.parent / "cache"))
    os.utime(music / "b/1.wav", ns=(0, 0))
    assert prepare(music, workers=1, progress=False).folder != first.folder
    assert prepare(music, workers=1, progress=False, sample_rate=RATE).sample_rate == RATE
    assert len(list((music.parent / "cache/folders").iterdir())) == 3


def test_out_is_never_somebody_elses(music):
    with pytest.raises(ValueError, match="is not empty and was not made by us"): ready(music, music)
    ready(music)
    with pytest.raises(ValueError, match="holds 6 files of .*music at 8000 Hz.*; got 6 files of .* at 4000 Hz"): ready(music, sample_rate=4000)


BUILD = """
import sys, time
from musicssl.data import folder
decode = folder.decode
def slow(path, rate):
    print(path.name, flush=True)
    time.sleep(.2)
    return decode(path, rate)
folder.decode = slow
folder.prepare(sys.argv[1], sys.argv[2], sample_rate=8000, workers=1, progress=False)
"""


def test_a_killed_build_resumes_to_identical_bytes(music):
    """R26: killed while decoding its fourth file, refused, continued without decoding the first three again."""
    whole = ready(music, music.parent / "whole")
    killed = subprocess.Popen([sys.executable, "-c", BUILD, str(music), str(music.parent / "out")], stdout=subprocess.PIPE, text=True)
    for _ in range(4): killed.stdout.readline()
    time.sleep(.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    with pytest.raises(UnfinishedStore, match="building stopped after 3 chunks"): AudioFolder(music.parent / "out")
    assert "unfinished, 3 of 6 chunks" in describe(music.parent / "out")
    resumed = subprocess.run([sys.executable, "-c", BUILD, str(music), str(music.parent / "out")], capture_output=True, text=True, check=True)
    assert len(resumed.stdout.split()) == 3
    assert contents(music.parent / "out") == contents(whole.folder)


def test_mutation_facts_written_after_the_chunk_are_lost(music, monkeypatch):
    """R26 with the order of facts and chunk turned round: dying in between leaves a chunk without facts, and the build cannot go on."""
    write = files.write_json
    def dies(path, value):
        if path.name == "00000.json": raise KeyboardInterrupt
        write(path, value)
    monkeypatch.setattr(files, "write_json", dies)
    with pytest.raises(KeyboardInterrupt): ready(music)
    assert not (music.parent / "out/00000.int16").exists(), "the chunk must not be there before its facts"
    monkeypatch.undo()
    assert ready(music).ids().size == 6
    (music.parent / "out/index.json").unlink(); (music.parent / "out/00000.json").unlink() # as the other order would leave it
    with pytest.raises(FileNotFoundError): ready(music)


def test_several_processes_make_the_same_bytes(music):
    one = ready(music)
    two = ready(music, music.parent / "two", workers=2)
    assert contents(one.folder) == contents(two.folder)


def flip(path, at=2000):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def test_a_flipped_bit_is_found_and_only_its_chunk_made_again(music, monkeypatch):
    """R14."""
    attic = ready(music)
    before = contents(attic.folder)
    flip(attic.folder / "00002.int16")
    with pytest.raises(CorruptStore, match="chunk 2 has changed"): AudioFolder(attic.folder).wave([2])
    fine, told = check(attic.folder, progress=False)
    assert not fine and "5 of 6 chunks good" in told and "remove index.json 00002.int16 from" in told and "musicssl data prepare" in told
    for name in ("index.json", "00002.int16"): (attic.folder / name).unlink()
    decoded = []
    monkeypatch.setattr(room, "decode", lambda path, rate: decoded.append(path.name) or decode(path, rate))
    assert contents(ready(music).folder) == before and decoded == ["6.flac"] and check(attic.folder, progress=False)[0]


def test_mutation_without_checksums_the_check_finds_nothing(music, monkeypatch):
    """R14 taken away: a store that compares nothing passes the damaged folder."""
    attic = ready(music)
    flip(attic.folder / "00002.int16")
    mapped = store_room._map
    monkeypatch.setattr(store_room, "_map", lambda folder, plan, chunk, lengths, checksum: mapped(folder, plan, chunk, lengths, None))
    assert check(attic.folder, progress=False)[0]


def test_changed_labels_are_noticed(music):
    attic = ready(music)
    path = attic.folder / "labels.json"
    path.write_text(path.read_text().replace('"train"', '"valid"').replace('"test"', '"valid"'))
    with pytest.raises(CorruptStore, match="labels.json is missing or has changed"): AudioFolder(attic.folder)
    assert not check(attic.folder, progress=False)[0]
    path.unlink()
    assert ready(music).fingerprint == attic.fingerprint


# Labels and splits

HEAD = "file,split,artist,tags,slow,caption\n"
GOOD = HEAD + "a/4.mp3,train,x,red|blue,1,one\na/4.mp3,train,x,red|blue,1,two\nb/1.wav,test,y,,0,\n"


def table(music, text): (music / "labels.csv").write_text(text, encoding="utf8"); return read_table(music / "labels.csv", find_files(music))


def test_a_table_becomes_labels(music):
    table(music, GOOD)
    attic = ready(music)
    assert attic.tag_names == ["slow", "blue", "red"] and attic.tags[[0, 3]].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert attic.captions[0] == ["one", "two"] and attic.captions[3] == []
    assert attic.ids("train").tolist() == [0] and attic.ids("test").tolist() == [3] and attic.ids().tolist() == [0, 3]
    assert "4 not in labels.csv" in summary(attic) and attic.table().loc["a/4.mp3", "artist"] == "x"
    with pytest.raises(ValueError, match="got split 'dev', wanted train, valid, test"): attic.ids("dev")


def test_a_new_table_decodes_nothing_and_changes_the_fingerprint(music, monkeypatch):
    plain = ready(music)
    table(music, GOOD)
    monkeypatch.setattr(room, "build", lambda *_: pytest.fail("decoded again"))
    labelled = ready(music)
    assert labelled.folder == plain.folder and labelled.fingerprint != plain.fingerprint and plain.ids().size == 6


@pytest.mark.parametrize("text, message", [
    (HEAD.replace("file", "path") + "a/4.mp3,train,x,,1,\n", "line 1: no column `file`, there are path, split"),
    (GOOD.replace("b/1.wav", "b/1.wave"), "line 4: there is no file 'b/1.wave'; the nearest is 'b/1.wav'"),
    (GOOD.replace("test", "tset"), "line 4: got split 'tset', wanted train, valid, test; the nearest is 'test'"),
    (GOOD.replace("test", ""), "line 4: got split '', wanted"),
    (GOOD.replace("1,two", "1,one"), "line 3: this file stands already in line 2, and this row has no other caption"),
    (GOOD.replace("x,red|blue,1,two", "z,red|blue,1,two"), "line 3: this file stands already in line 2, and their `artist` differs: 'x' there, 'z'"),
    (GOOD.replace("y,,0,", "y,,0"), "line 4: got 5 cells, wanted 6"),
    (GOOD.replace("1,two", "1,two, and more"), "line 3: got 7 cells, wanted 6; a comma inside a text needs quotes"),
    (HEAD, "labels.csv has no rows"),
    (HEAD.replace("artist", "slow"), "line 1: column 'slow' stands there twice"),
    ("file,slow\n" + "".join(f"{name},1\n" for name in ("a/4.mp3", "a/5.wav", "a/6.flac", "b/1.wav", "b/2.flac")) * 2 + "b/3.ogg,yes\n",
     "line 12, column 'slow': got 'yes', wanted 0 or 1 like the other rows"),
])
def test_a_wrong_table_says_where(music, text, message):
    with pytest.raises(BadTable) as refusal: table(music, text)
    assert message in str(refusal.value)


def test_tables_of_other_programs(music):
    assert table(music, "\ufefffile;tags\r\na\\4.mp3;red\r\n").rows["a/4.mp3"]["tags"] == ["red"]
    (music / "labels.csv").write_bytes(b"file,title\na/4.mp3,Caf\xe9\n")
    with pytest.raises(BadTable, match="labels.csv is not UTF-8 text .* at byte 22"): read_table(music / "labels.csv", find_files(music))
    with pytest.raises(BadTable, match="there is no table .*lables.csv; the nearest is 'labels.csv'"): ready(music, table=music / "lables.csv")


def test_a_split_never_divides_a_group_and_stays():
    names = [f"{i}.wav" for i in range(3000)]
    by_name, by_artist = (np.array([row["split"] for row in label_rows(names, labels)]) for labels in (
        None, Labels({name: {"tags": [], "captions": [], "artist": f"artist {i % 500}"} for i, name in enumerate(names)}, [])))
    for split, share in zip(room.SPLITS, (.7, .1, .2)):
        assert abs((by_name == split).mean() - share) < .03 and abs((by_artist == split).mean() - share) < .06
    assert all((by_artist[i::500] == by_artist[i]).all() for i in range(500)), "an artist stands on one side"
    assert not all((by_name[i::500] == by_name[i]).all() for i in range(500)), "mutation: by name, artists would be divided"
    assert label_rows(["x/a.wav"])[0]["split"] == label_rows(["x/a.flac"])[0]["split"], "one recording in two formats"
    assert hashlib.sha256("".join(by_name).encode()).hexdigest()[:8] == "dee2a2f0", "the same on every machine, for ever"


def test_a_data_set_hands_over_files_labels_and_splits(music):
    found = {"track-2": music / "b/1.wav", "track-1": music / "a/4.mp3"} # its own names, in its own order
    rows = {"track-1": {"tags": ["red"], "captions": ["…"], "split": "test"}, "track-2": {"tags": [], "captions": [], "split": "train"}}
    labels = Labels(rows, ["blue", "red"], "a paper")
    made = prepare_files("set", found, labels, music.parent / "set", RATE, workers=1, progress=False)
    assert made.clip_id == ["track-2", "track-1"] and made.ids("test").tolist() == [1] and made.tags.tolist() == [[0, 0], [0, 1]]


# The command line

def in_a_process(cache, *arguments):
    """The command as the shell runs it: status, stdout, stderr."""
    done = subprocess.run([sys.executable, "-c", "import sys; from musicssl.reproduce import main; sys.exit(main())", "data", *map(str, arguments)],
                          env={**os.environ, "MUSICSSL_CACHE": str(cache)}, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def musicssl(tmp_path, monkeypatch, capsys):
    """The command in this process, with a cache of its own: status, stdout, stderr."""
    from musicssl.reproduce import main
    monkeypatch.setenv("MUSICSSL_CACHE", str(tmp_path / "cache"))
    return lambda *arguments: (main(["data", *map(str, arguments)]), *capsys.readouterr())


def test_the_command_from_a_shell(music, tmp_path):
    status, said, bars = in_a_process(tmp_path / "cache", "prepare", music, "--rate", RATE, "--workers", 1)
    assert status == 0 and "6 tracks, 0.00 h, 8000 Hz mono" in said and "decoding: 100%" in bars and "decoding" not in said
    flip(next((tmp_path / "cache/folders").iterdir()) / "00003.int16")
    status, said, errors = in_a_process(tmp_path / "cache", "check", "music")
    assert status == 1 and "5 of 6 chunks good" in said and "chunk 3 has changed" in said and "remove index.json 00003.int16" in said
    assert "Traceback" not in errors


def test_the_command_lists_and_explains(music, tmp_path, musicssl):
    assert "nothing in" in musicssl("list")[1]
    assert musicssl("prepare", music, "--rate", RATE, "--workers", 1, "--min-seconds", 1.2)[0] == 0
    name = next((tmp_path / "cache/folders").iterdir()).name
    status, said, _ = musicssl("list")
    assert status == 0 and said.splitlines()[1].split()[:5] == [name, "folder", "5", "0.00", "8000"] and "complete" in said
    status, said, _ = musicssl("info", "music")
    assert status == 0 and "split       train" in said and "1 TooShortAudio" in said
    assert musicssl("info", music / "a/4.mp3")[1].splitlines()[1].split() == ["format", "MP3/MPEG_LAYER_III"]
    assert musicssl("check", name)[:2] == (0, "6 clips, 0.00 h, 6 of 6 chunks good\n")


def test_the_command_refuses_in_one_line(music, musicssl):
    add_faults(music)
    (music.parent / "bad.csv").write_text("file\na/4.mp4\n")
    for arguments, message in [(("prepare", music.parent / "musci"), "musicssl: there is no folder .*musci; the nearest is 'music'"),
                               (("prepare", music), "musicssl: 3 of 13 files are bad .* The list is in .*quarantine.json"),
                               (("prepare", music, "--table", music.parent / "bad.csv"), "musicssl: .*line 2: there is no file 'a/4.mp4'; the"),
                               (("info", music.parent / "musix"), "musicssl: there is no .*; the nearest is 'music'"),
                               (("info", music / "c/letter.wav"), "musicssl: .*not audio that libsndfile can read")]:
        status, said, errors = musicssl(*arguments)
        assert status == 1 and not said and re.fullmatch(message + ".*", errors.strip().splitlines()[-1]), errors


def test_listing_names_and_files(music, monkeypatch):
    cache = music.parent / "cache"
    assert "nothing in" in cache_listing(cache)
    for name in ("music-aa", "music-ab"): ready(music, cache / "folders" / name)
    (cache / "folders/music-ab/index.json").unlink()
    assert "unfinished, 6 of 6 chunks" in cache_listing(cache)
    assert find_in_cache("music-aa", cache).name == "music-aa"
    with pytest.raises(ValueError, match="'music' may be music-aa or music-ab"): find_in_cache("music", cache)
    with pytest.raises(ValueError, match="the nearest is 'music-a[ab]'"): find_in_cache("musik-aa", cache)
    assert "22050 Hz" in describe(music / "a/5.wav") and "2 x WAV/PCM_16" in describe(music)


def test_check_of_plain_audio_lists_every_fault(music):
    assert check(music, workers=1, progress=False)[0]
    add_faults(music)
    fine, told = check(music, workers=1, progress=False)
    assert not fine and told.startswith("7 of 13 files good") and all(name in told for name in FAULTS)
    assert not (music.parent / "out").exists() and check(music / "a/5.wav", progress=False)[0]


def test_the_data_command_needs_no_notebooks():
    """`musicssl data` works where papermill, doit and the drawing packages are not installed."""
    names = ("papermill", "nbformat", "doit", "matplotlib", "seaborn", "pandas", "librosa", "torchaudio")
    code = (f"import sys\nfor name in {names}: sys.modules[name] = None\n"
            "from musicssl.reproduce import main\nsys.exit(main(['data', 'list']))")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
