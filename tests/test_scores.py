"""The readers against real files, the table against damage, and the build against everything that may go missing."""
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from musicssl.data import scores
from musicssl.data.abc import read_abc
from musicssl.data.notation import TICKS, read_musicxml

SOURCE = "f0f3da1c203f692f" # the files of music21 10.5.1, read by this version of the readers
DIGEST = "5b339257367e11050f764a0d1a4efe78b0becbd5dbe05dbbdf2462ba9e2c18f9" # and the table made of them

TUNE = "X:{number}\nT:{title}\nM:6/8\nL:1/8\nK:D\nA|dfa agf|gfe ABc|dfa agf|edc d2:|\n"


@pytest.fixture(scope="module")
def table():
    return scores.load_table(progress=False)


@pytest.fixture
def small_corpus(tmp_path, monkeypatch):
    """A corpus of our own: one good tune, and everything a reader must refuse."""
    root = tmp_path / "corpus"
    for name, content in {
        "airdsAirs/book1.abc": TUNE.format(number=1, title="A Good Tune") + "\nX:2\nT:Short\nK:C\nCDE|\n"
                               + "\nX:3\nT:Odd\nK:C hyper\n" + "CDEF|" * 8 + "\n\nX:4\nT:No key\n",
        "monteverdi/cut.mxl": "PK\x03\x04 this was a zip file once",
        "monteverdi/text.xml": "not XML at all",
        "monteverdi/opus.xml": "<opus/>",
        "monteverdi/notes.rntxt": "m1 I",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(scores, "corpus_root", lambda: root)
    return root


def test_counts_of_every_collection(table):
    counts = {name: table.collections.count(name) for name in scores.COLLECTIONS}
    assert counts == dict(oneill=2009, aird=1180, ryan=1059, bach=410, trecento=103, monteverdi=49, others=67)
    assert len(table) == len(set(table.ids)) == 4877 and table.unreadable == []


def test_the_table_is_the_same_everywhere(table):
    if table.facts["source"] != SOURCE: pytest.skip("another music21 or another version of the readers")
    assert scores._digest(table.arrays) == DIGEST


def test_every_score_is_in_order(table):
    for score in table:
        assert (np.diff(score.onset_ticks) >= 0).all() and score.onset_ticks[0] >= 0 and (score.duration_ticks > 0).all(), score.score_id
        assert (score.onset_ticks + score.duration_ticks).max() <= score.end + 8 * TICKS and score.part.max() < len(score.parts), score.score_id
        assert score.bars[0] == 0 and (np.diff(score.bars) > 0).all() and np.isin(score.downbeats, score.bars).all(), score.score_id
        assert 21 <= score.pitch.min() and score.pitch.max() <= 108, score.score_id


def test_upbeats_of_a_real_tune(table):
    """The Miners of Wicklow: upbeat, eight bars of 6/8 whose last is an eighth short, all repeated, twice."""
    score = table["aird/book1/0023"]
    assert score.metre == (6, 8) and score.bars[1] == TICKS // 2
    assert score.downbeats.tolist() == [TICKS // 2 + 3 * TICKS * bar for bar in range(32)]
    assert len(score.bars) == 32 + 4


def test_upbeat_of_a_chorale(table):
    score = table["bach/bwv66.6"]
    assert score.bars[:3].tolist() == [0, TICKS, 5 * TICKS]
    assert score.downbeats.tolist() == [TICKS + 4 * TICKS * bar for bar in range(9)]


def test_a_bar_that_a_repeat_cuts():
    score = read_abc("X:1\nM:3/4\nL:1/4\nK:C\n|: C | D E F | G A :| B | c d e | c2 |]")
    assert (score.bars / TICKS).tolist() == [0, 1, 4, 6, 7, 10, 12, 13, 16]
    assert (score.downbeats / TICKS).tolist() == [1, 4, 7, 10, 13, 16]


def test_parts_of_a_madrigal_stay_together(table):
    """Rests that last too long in one part must not push it behind the others."""
    madrigals = [score for score in table if score.collection == "monteverdi"]
    lengths = np.concatenate([np.diff([*score.bars, score.end]) for score in madrigals])
    assert (lengths == 4 * TICKS).mean() > .97
    for score in madrigals:
        ends = [(score.onset_ticks + score.duration_ticks)[score.part == part].max() for part in np.unique(score.part)]
        assert max(ends) - min(ends) <= 16 * TICKS, score.score_id


def test_music21_reads_the_same_notes():
    music21 = pytest.importorskip("music21")
    path = scores.corpus_root() / "bach" / "bwv66.6.mxl"
    ours = read_musicxml(path.read_bytes())
    theirs = [(float(note.offset), pitch.midi, float(note.quarterLength))
              for part in music21.converter.parse(path, forceSource=True, storePickle=False).parts
              for note in part.stripTies().flatten().notes for pitch in note.pitches]
    assert sorted(zip(ours.onset.tolist(), ours.pitch.tolist(), ours.duration.tolist())) == sorted(theirs)


def test_number_of_processes_does_not_matter(tmp_path):
    for workers in (1, 2): scores.build_table(["monteverdi"], workers=workers, progress=False).save(tmp_path / f"{workers}.npz")
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()


def test_what_cannot_be_read_is_listed(small_corpus, tmp_path):
    table = scores.load_table(tmp_path, ["monteverdi", "aird"], workers=1, progress=False)
    assert table.ids == ["aird/book1/1"] and table[0].title == "A Good Tune" and table.groups[0] >= 0
    reasons = dict(table.unreadable)
    assert set(reasons) == {"aird/book1/2", "aird/book1/3", "aird/book1/4", "monteverdi/cut", "monteverdi/text", "monteverdi/opus"}
    assert "got 3 notes" in reasons["aird/book1/2"] and "hyper" in reasons["aird/book1/3"] and "K:" in reasons["aird/book1/4"]


def test_a_changed_file_makes_a_new_table(small_corpus, tmp_path):
    first = scores.load_table(tmp_path, ["aird"], workers=1, progress=False)
    (small_corpus / "airdsAirs/book2.abc").write_text(TUNE.format(number=9, title="A Good Tune, again"))
    second = scores.load_table(tmp_path, ["aird"], workers=1, progress=False)
    assert len(first) == 1 and len(second) == 2 and second.groups[0] == second.groups[1]
    assert len(list(tmp_path.glob("scorebox-*.npz"))) == 2


@pytest.mark.parametrize("damage", [lambda content: content[:len(content) // 2], lambda content: b"",
                                    lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:]])
def test_a_damaged_table_is_built_again(small_corpus, tmp_path, damage):
    scores.load_table(tmp_path, ["aird"], workers=1, progress=False)
    path, = tmp_path.glob("scorebox-*.npz")
    good = path.read_bytes()
    path.write_bytes(damage(good))
    with pytest.raises(scores.CorruptTable, match=path.name): scores.open_table(path)
    with pytest.warns(UserWarning, match="building it again"): scores.load_table(tmp_path, ["aird"], workers=1, progress=False)
    assert path.read_bytes() == good


def test_without_music21(small_corpus, tmp_path, monkeypatch):
    scores.load_table(tmp_path, ["aird"], workers=1, progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None)
    assert scores.load_table(tmp_path, ["aird"]).ids == ["aird/book1/1"], "a table that was copied here is used"
    with pytest.raises(ModuleNotFoundError, match=r'pip install "musicssl\[data\]"'): scores.load_table(tmp_path, ["ryan"])
    with pytest.raises(ModuleNotFoundError, match=r'pip install "musicssl\[data\]"'): scores.build_table()


def test_a_script_without_a_guard(tmp_path):
    """Spawned processes import the script again; without `if __name__ == "__main__"` they fail, and the table is built all the same."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent("""
        from musicssl.data import scores
        print(len(scores.build_table(["monteverdi"], workers=2, progress=False)))
    """))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=Path(scores.__file__).parents[2], timeout=120)
    assert done.returncode == 0 and done.stdout.split() == ["49"] and "worker processes could not start" in done.stderr
