"""MagnaTagATune, in a small set of its true layout: the split, the songs, what is refused, and chapter 1 on it from end to end."""
import csv

import numpy as np
import pytest
import soundfile
import torch

from musicssl import audio, files, settings
from musicssl.data import magnatagatune as mtat
from musicssl.data.corpora import open_folder, whole_clip
from musicssl.data.folder import BadTable
from musicssl.experiments import clmr, clmr_choices as choices

RATE, SECONDS = 16_000, 3.2
FOLDERS = "0123456789abcdef"


def write_set(folder, songs_in_each=2, clips_of_each=2, broken=()):
    """`annotations_final.csv` and MP3s of clicks: tag k is heard as a tone of its own."""
    rng, rows = np.random.default_rng(0), []
    t = np.arange(round(SECONDS * RATE)) / RATE
    others = [f"other {i}" for i in range(138)]
    for digit in FOLDERS:
        (folder / digit).mkdir(parents=True)
        for song in range(songs_in_each):
            for number in range(clips_of_each):
                path = f"{digit}/anon-album_{digit}-{song:02d}-piece-{29 * number}-{29 * number + 29}.mp3"
                has = rng.random(50) < .15
                wave = sum((np.sin(2 * np.pi * 60 * 1.09 ** k * t) for k in np.flatnonzero(has)), 0 * t) + .01 * rng.standard_normal(len(t))
                soundfile.write(folder / path, .5 * wave / np.abs(wave).max(), RATE, format="MP3")
                if path in broken: (folder / path).write_bytes(b"")
                rows.append({"clip_id": len(rows), **dict.fromkeys(others, "0"), **{tag: str(int(on)) for tag, on in zip(mtat.TAGS, has)}, "mp3_path": path})
    write_table(folder, rows)
    return rows


def write_table(folder, rows):
    with (folder / "annotations_final.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder of data sets, and a cache of its own."""
    home = tmp_path_factory.mktemp("sets")
    rows = write_set(home / "magnatagatune", broken=["0/anon-album_0-00-piece-0-29.mp3"])
    (home / "GTZAN" / "blues").mkdir(parents=True)
    for k in range(8): soundfile.write(home / "GTZAN" / "blues" / f"blues.{k:05d}.wav", .3 * np.sin(np.arange(4 * 22050 + 100 * k) * (k + 1) / 50), 22050)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUSICSSL_DATASETS", str(home))
        patch.setenv("MUSICSSL_CACHE", str(home / "cache"))
        yield home, rows


@pytest.fixture(scope="module")
def corpus(sets): return mtat.load(64, 3., 8000, bad=.05, progress=False)


def test_every_folder_has_its_split():
    """Folders 0 to b are train, c valid, d to f test; 18,709, 1,825 and 5,329 clips are 25,863."""
    assert [mtat.split_of_clip(f"{digit}/x-0-29.mp3") for digit in FOLDERS] == ["train"] * 12 + ["valid"] + ["test"] * 3
    assert mtat.SIZES == {"train": 18709, "valid": 1825, "test": 5329} and sum(mtat.SIZES.values()) == 25863


def test_tags_are_the_benchmark_s():
    assert len(mtat.TAGS) == len(set(mtat.TAGS)) == 50
    assert (mtat.TAGS[0], mtat.TAGS[9], mtat.TAGS[21], mtat.TAGS[37], mtat.TAGS[49]) == ("guitar", "piano", "no vocals", "new age", "choral")


def test_no_song_is_in_two_splits(corpus):
    songs = [set(corpus.group[corpus.ids(split)]) for split in ("train", "valid", "test")]
    assert [len(part) for part in songs] == [24, 2, 6] and len(set.union(*songs)) == 32


def test_labels_are_the_table_s_in_the_benchmark_s_order(corpus, sets):
    said = {row["mp3_path"]: [int(row[tag]) for tag in mtat.TAGS] for row in sets[1]}
    assert all(corpus.tags[i].tolist() == said[clip] for i, clip in enumerate(corpus.clip_id)) and corpus.tag_names == list(mtat.TAGS)


def test_an_empty_file_is_left_out_and_named(corpus):
    used = [corpus.clip_id[i] for i in corpus.ids()]
    assert len(used) == 63 and "0/anon-album_0-00-piece-0-29.mp3" not in used
    assert "UnreadableAudio" in {fact["problem"] for fact in corpus.facts}


def test_clips_without_a_tag_are_kept(tmp_path):
    """Dropping them, as cleaned lists do, would change every score."""
    rows = write_set(tmp_path, 1, 1)
    for row in rows[:3]: row.update(dict.fromkeys(mtat.TAGS, "0"))
    write_table(tmp_path, rows)
    labels = mtat.read_annotations(tmp_path / "annotations_final.csv")
    assert len(labels.rows) == 16 and sum(not row["tags"] for row in labels.rows.values()) >= 3


def test_all_clips_come_in_one_length(corpus):
    """MP3s differ by a few samples; without the cut the store refuses to stack them."""
    wave = corpus.wave(corpus.ids("test"))
    assert wave.shape == (12, 24_000) and whole_clip(corpus) == 24_000
    assert torch.equal(corpus.wave([1], 100, 50)[0], corpus.wave([1])[0, 100:150])


def test_sound_is_what_is_in_the_file(corpus, sets):
    """Mono, and neither made louder nor centred: the mean of CLMR's normalisation is none."""
    clip = int(corpus.ids("valid")[0])
    there = audio.read(sets[0] / "magnatagatune" / corpus.clip_id[clip], 8000)[:24_000]
    assert torch.allclose(corpus.wave([clip])[0], there, atol=1e-4) and .3 < float(there.abs().max()) < .9


@pytest.mark.parametrize("spoil, error, message", [
    (lambda home, rows: write_table(home, rows[:-1]), BadTable, "names 15 clips, wanted 16"),
    (lambda home, rows: (home / rows[3]["mp3_path"]).unlink(), FileNotFoundError, "1 of 16 clips are not in .*3/anon-album_3-00-piece-0-29.mp3 for one"),
    (lambda home, rows: write_table(home, [*rows[:-1], rows[0]]), BadTable, "line 17: 0/anon.* stands there twice"),
    (lambda home, rows: write_table(home, [{**rows[0], "piano": "yes"}, *rows[1:]]), BadTable, "line 2: piano is 'yes', wanted 0 or 1"),
    (lambda home, rows: write_table(home, [{k: v for k, v in row.items() if k != "opera"} for row in rows]), BadTable, "no column 'opera'"),
    (lambda home, rows: write_table(home, [{**rows[0], "mp3_path": "mp3/0/a-0-29.mp3"}, *rows[1:]]), BadTable, "wanted one in a folder 0 to 9 or a to f"),
    (lambda home, rows: write_table(home, [{**rows[0], "mp3_path": "0/a.mp3"}, *rows[1:]]), BadTable, "ends in its seconds"),
    (lambda home, rows: (home / "annotations_final.csv").unlink(), FileNotFoundError, "nbs/34_magnatagatune.ipynb says how to get MagnaTagATune"),
], ids=["a row less", "a file less", "a clip twice", "not a number", "a tag less", "one folder too deep", "no seconds", "no table"])
def test_half_a_set_is_refused(tmp_path, spoil, error, message):
    spoil(tmp_path, write_set(tmp_path, 1, 1))
    with pytest.raises(error, match=message): mtat.load(16, 3., 8000, folder=tmp_path, out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists(), "something was decoded before the check"


def test_the_whole_set_must_split_as_published(tmp_path, monkeypatch):
    rows = write_set(tmp_path, 1, 1)
    monkeypatch.setattr(mtat, "SIZES", {"train": 11, "valid": 2, "test": 3})
    with pytest.raises(BadTable, match="splits into .*'train': 12.* wanted .*'train': 11"): mtat.load(len(rows), 3., 8000, folder=tmp_path, progress=False)


def test_a_folder_of_recordings_needs_no_table(sets):
    heard = open_folder("GTZAN", 8000, 3.5)
    assert len(heard.ids()) == 8 and len(set(heard.store.lengths.tolist())) > 1
    with pytest.raises(FileNotFoundError, match="put the recordings of MSD there"): open_folder("MSD", 8000, 3.)


@pytest.mark.parametrize("paper, arms", [(clmr, ("clmr", "supervised", "supervised_segments", "mfcc")), (choices, ("base", "on GTZAN", "an item is a song", "random"))])
def test_the_chapter_runs_on_it(corpus, sets, tmp_path, monkeypatch, paper, arms):
    """Every arm that reads the corpus in a way of its own; `test`'s sizes, the paper's music."""
    read = settings.load
    monkeypatch.setattr(settings, "load", lambda profile, name=None: read(profile, name) | {"corpus": "MagnaTagATune", "clips": "64", "seconds": "3"} |
                        ({"transfer": "GTZAN"} if name == "clmr_choices" else {}))
    grid = paper.grid("test")
    assert all(config["corpus"] == "MagnaTagATune" for config in grid) and not any(config["arm"] == "on tunes" for config in grid)
    for name in arms:
        config = next(config for config in grid if config["arm"] == name)
        metrics, arrays = paper.run(config, tmp_path / name)
        scores = [value for key, value in arrays.items() if "@" in key and value.shape == (12, 50)]
        assert scores and all(np.isfinite(value).all() for value in scores)
        assert np.array_equal(arrays["labels"], corpus.tags[corpus.ids("test")])


def test_a_clip_that_ends_before_its_header_says_is_left_out(sets, tmp_path):
    """The header promises a length; an MP3 may hold a frame or two less, and nobody may notice that after days of training."""
    write_set(tmp_path, songs_in_each=1, clips_of_each=1)
    path = next((tmp_path / "c").iterdir())
    path.write_bytes(path.read_bytes()[:-400])
    short = mtat.load(16, SECONDS, 8000, tmp_path, out=tmp_path / "out", progress=False)
    assert short.n_samples > short.store.lengths[12] > 0 and 12 not in short.ids() and len(short.ids("valid")) == 0
    assert len(short.ids()) == 15 and short.wave(short.ids()).shape == (15, short.n_samples)


@pytest.mark.parametrize("spoil, message", [
    (lambda text: text[:text.rindex("\t")], "line 17: got fewer cells than there are columns"),
    (lambda text: text.replace("0-29.mp3", "0.mp3"), "line 2: got clip .* wanted a name that ends in its seconds"),
    (lambda text: text.replace('"a/', '"x/'), "line 12: got clip .* wanted one in a folder"),
    (lambda text: text.splitlines()[0] + "\n", "names no clip")])
def test_a_spoilt_table_is_refused_with_its_line(tmp_path, spoil, message):
    write_set(tmp_path, songs_in_each=1, clips_of_each=1)
    table = tmp_path / "annotations_final.csv"
    table.write_text(spoil(table.read_text()))
    with pytest.raises(BadTable, match=message): mtat.read_annotations(table)


def test_too_many_bad_recordings_say_what_goes_on_without_them(sets, capsys):
    from musicssl.reproduce import main
    home, _ = sets
    (home / "FMA").mkdir()
    for k in range(4): soundfile.write(home / "FMA" / f"{k}.wav", .3 * np.sin(np.arange(4 * 22050) * (k + 1) / 50), 22050)
    (home / "FMA" / "bad.mp3").write_bytes(b"\x01" * 3000)
    with pytest.raises(audio.TooManyBadFiles) as caught: open_folder("FMA", 8000, 3.5)
    command = str(caught.value).partition("`musicssl ")[2].partition("`")[0].replace("SHARE", ".5")
    assert main(command.split()) == 0 and len(open_folder("FMA", 8000, 3.5).ids()) == 4
    capsys.readouterr()


def test_the_command_line_says_in_a_line_what_to_get(tmp_path, monkeypatch, capsys):
    from musicssl.reproduce import main
    for name in ("MUSICSSL_DATASETS", "MUSICSSL_FIGURES"): monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("MUSICSSL_PROFILE")
    assert main(["train", "--paper", "clmr", "--profile", "paper", "--arm", "clmr", "--seed", "0"]) == 1
    said = capsys.readouterr().err
    assert "annotations_final.csv; nbs/34_magnatagatune.ipynb says how to get MagnaTagATune" in said and "Traceback" not in said


def test_records_of_scorebox_keep_their_names():
    """Naming the corpus in every configuration would orphan all records made before there was a choice."""
    for paper in (clmr, choices):
        grid = paper.grid("laptop")
        folder = settings.root() / "figures" / "laptop" / "records" / paper.PAPER
        assert not any("corpus" in config for config in grid)
        assert {files.fingerprint(files.plain(config)) for config in grid} <= {path.stem for path in folder.glob("*.json")}
