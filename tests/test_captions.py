"""Captions say what they claim to say, err as often as asked, and are the same everywhere."""
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from musicssl.data import captions
from musicssl.data.arrange import arrange
from musicssl.data.captions import FACTS, NEEDED, PLANS, caption, captions_of, count_facts, facts_of, read_facts, sentence, tidy_title
from musicssl.data.scorebox import deal
from musicssl.data.scores import load_table

needs_data = pytest.mark.skipif(importlib.util.find_spec("music21") is None, reason='needs pip install "musicssl[data]"')


def row(name, **changes):
    """A label row made by hand."""
    plain = dict(clip_id=f"{name}#0", score_id=name, collection=name.split("/")[0], title="THE MILK MAID -- JIG", composer=None, bpm=112.,
        metre=[6, 8], tune_type="jig", tonic=2, mode="major", tags=["bass", "drums", "harp", "violin"], texture="full")
    return plain | changes


ROWS = [
    row("ryan/1"),
    row("oneill/2", tune_type="slip jig", metre=[9, 8], tonic=6, mode="minor", tags=["drums"], texture="solo", bpm=130.),
    row("aird/3", tune_type=None, metre=None, tonic=None, mode=None, tags=["choir"], texture="drone", bpm=60., title="March 3d. Regt."),
    row("bach/bwv1.6", tune_type=None, metre=[4, 4], tonic=5, tags=["cello", "oboe"], texture="ensemble", bpm=70., title="bwv1.6",
        composer="Johann Sebastian Bach"),
    row("monteverdi/madrigal.3.1", tune_type=None, metre=[3, 2], tonic=7, mode="mixolydian", tags=["choir"], texture="keyboard", bpm=90.,
        title="CANTO", composer="Claudio Monteverdi"),
    row("trecento/Kyrie", tune_type=None, metre=[5, 4], tonic=None, mode=None, tags=["strings"], texture="keyboard", title="Kyrie"),
    row("others/beethoven/opus74", tune_type=None, metre=[2, 4], tonic=10, tags=["clarinet", "flute", "sax", "trumpet"], texture="ensemble",
        title="String Quartet", composer="Ludwig van Beethoven"),
]


def score_rows(n):
    """Label rows of the corpus, without its sound."""
    scores = load_table(progress=False)
    return [arrange(scores[name], take, 3.).labels for name, take in deal(scores, n, 3.)]


@pytest.fixture(scope="module")
def rows():
    return ROWS + (score_rows(250) if importlib.util.find_spec("music21") else [])


def digest(rows):
    """One hash for the captions of some rows at three noise levels, with their facts."""
    made = [vars(caption(r, p, variant)) for r in rows for p in (0., .2, .5) for variant in range(3)]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


GOLDEN = "0d86346cc0226254"


def test_captions_have_not_changed():
    assert digest(ROWS) == GOLDEN


@needs_data
def test_captions_of_the_corpus_have_not_changed():
    assert digest(score_rows(40)) == "67ffefd5fb3609ce"


def test_two_fresh_environments_write_the_same():
    """Mutation: the instruments in the order of a set, which is another one in every process."""
    def fresh(hash_seed, mutation="pass"):
        code = f"import test_captions as t; {mutation}; print(t.digest(t.ROWS))"
        paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
        environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": paths, "LC_ALL": "C", "TZ": "Asia/Tokyo"}
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    unordered = "t.captions.TAGS = tuple(set(t.captions.TAGS))"
    running = [fresh(1), fresh(2), fresh(1, unordered), fresh(2, unordered)]
    one, two, *mutants = [process.communicate(timeout=120)[0].strip() for process in running]
    assert one == two == GOLDEN and len({GOLDEN, *mutants}) == 3


def stated(made):
    """What a caption claims to say, in the form in which it is read."""
    wrong = {name: [said for said, _ in pairs] if name == "instruments" else pairs[0] for name, pairs in made.corrupted.items()}
    players = sorted(made.used.get("instruments", []) + wrong.get("instruments", []))
    return made.used | wrong | ({"instruments": players} if players else {})


def misread(rows, levels=(0., .3, .7)):
    """Captions that do not say exactly what they claim to say."""
    made = [caption(r, p, variant) for r in rows for p in levels for variant in range(3)]
    return [c.text for c in made if read_facts(c.text) != stated(c)]


def test_every_fact_can_be_read(rows, monkeypatch):
    """Mutations: a plan that swallows the texture; a writer that says slow for fast."""
    assert misread(rows) == []
    with monkeypatch.context() as patch:
        patch.setitem(PLANS, "listed", (lambda p: captions._listed(p._replace(texture="")), ("source",)))
        assert misread(rows[:20])
    with monkeypatch.context() as patch:
        patch.setitem(captions.WORDS, "tempo", captions.WORDS["tempo"] | {"lively": ("slow",)})
        assert misread(rows[:20])


def test_what_is_stated_and_what_is_left_out_is_the_truth(rows):
    for r in rows:
        true = facts_of(r)
        for made in (caption(r, .4, variant) for variant in range(4)):
            tags = made.used.get("instruments", []) + [was for _, was in made.corrupted.get("instruments", [])] + made.dropped.get("instruments", [])
            assert sorted(tags) == sorted(r["tags"])
            for states in (made.used, made.dropped):
                assert all(states[name] == true[name] for name in states if name != "instruments")
            assert "tempo" not in made.corrupted or made.corrupted["tempo"][1] == true["tempo"]
            assert set(made.corrupted) <= {"instruments", "tempo"}
            left = set(true) - set(made.used) - set(made.corrupted) - set(made.dropped)
            assert left <= {"title", *PLANS[made.plan][1]}


RELATIVES = {"strings": "violin cello bass", "violin": "strings cello bass", "cello": "strings violin bass", "bass": "strings violin cello",
             "trumpet": "brass", "brass": "trumpet", "flute": "recorder", "recorder": "flute"}
TEMPOS = ["very slow", "slow", "moderate", "lively", "fast"]


def half_true(rows):
    """Falsified facts that could pass for true: the instrument plays, or a relative does; the tempo is from the next range."""
    found = []
    for r in rows:
        near = set(r["tags"]) | {name for tag in r["tags"] for name in RELATIVES.get(tag, "").split()}
        for made in (caption(r, .4, variant) for variant in range(6)):
            found += [said for said, _ in made.corrupted.get("instruments", []) if said in near]
            if "tempo" in made.corrupted and abs(np.diff([TEMPOS.index(word) for word in made.corrupted["tempo"]])[0]) < 2: found.append(made.text)
            assert len(set(stated(made).get("instruments", []))) == len(stated(made).get("instruments", []))
    return found


def test_what_is_wrong_is_really_wrong(rows, monkeypatch):
    """Mutations: relatives allowed; the next tempo allowed."""
    assert half_true(rows) == []
    with monkeypatch.context() as patch:
        patch.setattr(captions, "KIN", ())
        assert half_true(rows)
    with monkeypatch.context() as patch:
        patch.setattr(captions, "lies_about", lambda facts, draws: {("tempo", facts["tempo"]): TEMPOS[TEMPOS.index(facts["tempo"]) - 1]})
        assert half_true(rows)


def returned(rows, write):
    """Facts that come back, or words that change, as the noise grows."""
    levels, found = (0., .1, .2, .5, .9, 1.), []
    for r in rows:
        flat = lambda states: {(name, str(v)) for name, value in states.items() for v in (value if name == "instruments" else [value])}
        steps = [write(r, p) for p in levels]
        for low, high in zip(steps, steps[1:]):
            if low.plan != high.plan or not flat(low.dropped) <= flat(high.dropped) or not flat(high.used) <= flat(low.used): found.append(high.text)
    return found


def test_noise_only_takes_away(rows):
    """Mutation: choices that depend on the noise level."""
    assert returned(rows, caption) == []
    assert returned(rows[:20], lambda r, p: caption(r, p, seed=round(100 * p)))


def test_the_words_of_one_fact_do_not_depend_on_another(rows):
    for r in rows[:60]:
        quiet, loud = caption(r, 0.), caption(r, .5)
        words = set(re.findall(r"[\w'-]+", quiet.text.lower()))
        kept = {value: captions.WORDS[name][value] for name, value in loud.used.items() if name in ("tempo", "genre", "metre", "texture")}
        for value, ways in kept.items():
            said = [way for way in ways if way in loud.text.lower()]
            assert set(re.findall(r"[\w'-]+", max(said, key=len))) <= words, (quiet.text, loud.text)


def ungrammatical(text):
    """Reasons why a text cannot be printed."""
    plain = re.sub(r'"[^"]*"', '"T"', text)
    faults = {
        "spaces": re.search(r"\s\s|^\s|\s$|\s[,.;]|[,.;]\w", plain), "stops": not re.search(r"[^.]\.$", plain) or re.search(r"\.\.|,,|,\.|;\.|[,;] [,;]", plain),
        "capital": not re.match(r"[A-Z]", plain) or re.search(r"\. [a-z]", plain), "quotes": text.count('"') % 2,
        "article": re.search(r"(?<!of )\b([Aa] [aeiou]|[Aa]n [^aeiou])", plain), "none": re.search(r"None|nan|\[|\{|_", plain),
        "verb": re.search(r"^(?:\w+ ){0,2}\w+ and [\w ]+? (plays|performs)\b|(?:^|\. )Drums (plays|performs)|(?:^|\. )(?!Drums|We)\w+ (play|perform) ", plain)}
    return [name for name, fault in faults.items() if fault]


def test_grammar(rows):
    texts = [caption(r, p, variant).text for r in rows for p in (0., .3, .8, 1.) for variant in range(4)]
    bad = {text: found for text in texts if (found := ungrammatical(text))}
    assert not bad
    assert max(len(text.split()) for text in texts) <= 50


@pytest.mark.parametrize("text, fault", [
    ("A  reel.", "spaces"), ("A reel , over a drone.", "spaces"), ("A reel", "stops"), ("A reel..", "stops"), ("A reel, over a drone,.", "stops"),
    ("a reel.", "capital"), ("A reel. we hear it.", "capital"), ('A reel called "The Milk.', "quotes"), ("A unhurried reel.", "article"),
    ("An slow reel.", "article"), ("A reel by None.", "none"), ("Harp and flute plays a reel.", "verb"), ("Harp play a reel.", "verb"),
    ("Drums plays a reel.", "verb"), ("A reel. Harp and brass section plays it.", "verb")])
def test_bad_grammar_is_seen(text, fault):
    """Mutation: each fault written out."""
    assert fault in ungrammatical(text) or fault == "verb" and ungrammatical(text.split(". ")[-1]) == ["verb"]


@pytest.mark.parametrize("text, facts", [
    ("Slow reel; in A flat major and duple time; over a drone; harp, flute.",
     {"tempo": "slow", "genre": "reel", "tonic": "A flat", "mode": "major", "metre": "duple", "texture": "drone", "instruments": ["flute", "harp"]}),
    ('Here is an extremely slow slip jig called "In a Major Reel" from Aird\'s Airs without accompaniment, featuring cembalo.',
     {"tempo": "very slow", "genre": "slip jig", "title": "In a Major Reel", "source": "Aird's Airs", "texture": "solo", "instruments": ["harpsichord"]}),
    ("A quartet movement composed by Ludwig van Beethoven. Drum kit plays it in an ensemble setting, in a minor key and triple metre.",
     {"genre": "quartet", "source": "Ludwig van Beethoven", "instruments": ["drums"], "texture": "ensemble", "mode": "minor", "metre": "triple"}),
    ("In the key of F sharp, a work is heard.", {"tonic": "F sharp"}),
    ("A piece of music in the dorian mode.", {"mode": "dorian"}),
    ("A composition.", {})])
def test_reading(text, facts):
    assert read_facts(text) == facts


def test_plans_by_hand():
    phrases = captions.Phrases("slow chorale", "a", "by Johann Sebastian Bach", "in F major", "over a drone", ("drums",), "play", "Here is")
    assert {plan: sentence(plan, phrases) for plan in PLANS} == {
        "scored": "A slow chorale by Johann Sebastian Bach for drums, in F major, over a drone.",
        "played": "Drums play a slow chorale in F major over a drone.",
        "pointed": "Here is a slow chorale by Johann Sebastian Bach over a drone, featuring drums.",
        "listed": "Slow chorale; in F major; over a drone; drums.",
        "keyed": "In F major, a slow chorale is played by drums over a drone.",
        "twofold": "A slow chorale by Johann Sebastian Bach. Drums play it over a drone, in F major."}
    assert sentence("played", phrases._replace(players=("harp",), key="")) == "Harp plays a slow chorale over a drone."
    assert sentence("twofold", phrases._replace(players=(), texture="")) == "A slow chorale by Johann Sebastian Bach. We hear it in F major."


def test_unknown_facts_are_absent():
    assert set(facts_of(ROWS[2])) == {"instruments", "tempo", "texture", "source"}
    assert facts_of(ROWS[5]) == {"instruments": ["strings"], "tempo": "lively", "texture": "keyboard", "source": "the trecento collection"}
    assert facts_of(ROWS[3])["genre"] == "chorale" and "genre" not in facts_of(ROWS[3] | {"score_id": "bach/bwv846"})
    assert facts_of(ROWS[1])["tonic"] == "F sharp" and facts_of(ROWS[1] | {"tonic": 8})["tonic"] == "G sharp"
    assert facts_of(ROWS[0] | {"tonic": 8})["tonic"] == "A flat" and facts_of(ROWS[0] | {"tonic": 0})["tonic"] == "C"


@needs_data
def test_titles_are_fit_to_print():
    titles = {tidy_title(r["title"]) for r in load_table(progress=False).rows if r["collection"] in ("oneill", "ryan", "aird")} - {None}
    assert len(titles) > 3000
    odd = [title for title in titles if title != title.strip() or title.isupper() or '"' in title or re.search(r"\b(coon|dat|de)\b", title.lower())]
    assert odd == [] and tidy_title("OLD ZIP COON -- REEL") is None and tidy_title("N...... IN DE WOOD PILE -- JIG.") is None


def far_off(made, asked):
    """Whether the measured rates leave a band of four standard errors around those asked for."""
    counts = count_facts(made)
    stay = counts.loc[["instruments", "tempo"], ["true", "wrong"]].to_numpy()
    pairs = [(counts["left out"].sum(), counts.to_numpy().sum(), asked), (stay[:, 1].sum(), stay.sum(), asked / 2)]
    return any(abs(k / n - p) > 4 * (p * (1 - p) / n) ** .5 for k, n, p in pairs if n)


@pytest.mark.parametrize("noise", [0., .2, .5, 1.])
def test_measured_noise_is_the_noise_asked_for(rows, noise):
    """Mutation: captions of other noise passed off as these."""
    made = captions_of(rows, noise, per_clip=6)
    assert not far_off(made, noise) and far_off(captions_of(rows, .2 if noise == .5 else .5, per_clip=6), noise)


def test_captions_of_a_corpus(rows):
    corpus = type("Corpus", (), {"labels": rows[:5]})()
    table = captions_of(corpus, .3, per_clip=4, seed=1)
    assert list(table) == ["clip_id", "variant", "caption", "plan", "used", "corrupted", "dropped"] and len(table) == 20
    assert table.caption[7] == caption(rows[1], .3, variant=3, seed=1).text and table.clip_id[7] == rows[1]["clip_id"]
    assert list(count_facts(table).index) == list(FACTS) and table.caption.nunique() > 15
    assert captions_of(rows[:5]).caption.tolist() != captions_of(rows[:5], seed=1).caption.tolist()


def test_refusals():
    for noise in (-.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"wanted a probability in \[0, 1\]"): caption(ROWS[0], noise)
    for name in NEEDED:
        with pytest.raises(ValueError, match=f"lacks {name}; wanted clip_id, "): caption({k: v for k, v in ROWS[0].items() if k != name})
    with pytest.raises(ValueError, match="lacks bpm, tags"): captions_of([{k: v for k, v in ROWS[0].items() if k not in ("bpm", "tags")}])
