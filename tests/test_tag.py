"""A tagger in a file, its scores over time, and the command: what is heard is what plays, where it plays."""
import csv

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

from musicssl import audio, reproduce, tag as room, zoo
from musicssl.checkpoint import Mismatch, read_about
from musicssl.encoders.base import Embedding
from musicssl.probe import Probe
from musicssl.probe.tasks import Sizes
from musicssl.tag import Tagged, Tagger, fit_tagger, load_tagger, printed, save, save_tagger, tag, taggram

RATE = 8_000


class Pitch(nn.Module):
    """Hears how much of the sound lies below 1 kHz and how much above."""
    sample_rate, hop, dim, n_samples = RATE, RATE, 2, RATE

    def forward(self, wave):
        power = torch.fft.rfft(wave).abs().square()
        low, high = (part.sum(-1) for part in power.split([wave.shape[1] // 8, power.shape[1] - wave.shape[1] // 8], -1))
        clip = torch.stack([low, high], 1) / (low + high + 1e-9)[:, None]
        return Embedding(clip[:, None, None], clip)


def listener():
    """Two tags, sure of themselves."""
    probe = Probe(2, 2)
    probe.net[0].weight.data, probe.net[0].bias.data = 12 * torch.eye(2), torch.full((2,), -6.)
    return Tagger(Pitch(), probe, ["low", "high"], {"data": "sines"})


def sine(hertz, seconds):
    return torch.sin(2 * torch.pi * hertz * torch.arange(round(seconds * RATE)) / RATE)


SONG = torch.cat([sine(200, 3), sine(3000, 2), sine(200, 1.5)])


@pytest.fixture
def small():
    """A tagger whose file opens."""
    encoder, probe = zoo.new_encoder("samplecnn:8k-eighth", 5), Probe(64, 3, "mlp")
    for tensor in probe.state_dict().values(): nn.init.normal_(tensor)
    return Tagger(encoder, probe, ["a", "b", "c"], {"clips": 3}).eval()


# The file ----------------------------------------------------------------------------------------------------------------------------------------


def test_a_tagger_comes_back(small, tmp_path):
    save_tagger(tmp_path / "t.safetensors", small)
    back, wave = load_tagger(tmp_path / "t.safetensors"), .1 * torch.randn(2, small.n_samples)
    assert torch.equal(back(wave), small(wave)) and back.tags == ("a", "b", "c") and back.about == {"clips": 3} and not back.training
    assert torch.equal(zoo.load_encoder(tmp_path / "t.safetensors")(wave).clip, small.encoder(wave).clip) and room.is_tagger(tmp_path / "t.safetensors")


def test_other_files_and_classes_are_refused(small, tmp_path):
    zoo.save_encoder(tmp_path / "e.safetensors", small.encoder)
    with pytest.raises(Mismatch, match="holds an encoder alone"): load_tagger(tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match="there is no file"): load_tagger(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="got a Pitch, wanted one of"): save_tagger(tmp_path / "p.safetensors", listener())
    assert not (tmp_path / "p.safetensors").exists() and not room.is_tagger(tmp_path / "e.safetensors")


def test_a_read_out_that_was_cut_is_refused(small, tmp_path, monkeypatch):
    """Mutation: the read-out's weights are not read; the tagger then answers from zero means and fresh weights."""
    save_tagger(tmp_path / "t.safetensors", small)
    whole, wave = read_about(tmp_path / "t.safetensors"), .1 * torch.randn(1, small.n_samples)
    weights = {name: tensor for name, tensor in small.state_dict().items() if name != "probe.mean"}
    room.save_weights(tmp_path / "t.safetensors", weights, {name: whole[name] for name in ("encoder", "tagger")})
    with pytest.raises(Mismatch, match="mean: got nothing"): load_tagger(tmp_path / "t.safetensors")
    monkeypatch.setattr(room, "load_weights", lambda *_: None)
    assert not torch.equal(load_tagger(tmp_path / "t.safetensors")(wave), small(wave))


# Over time ---------------------------------------------------------------------------------------------------------------------------------------


def test_what_plays_is_heard_where_it_plays():
    heard = tag(listener(), SONG)
    assert (heard.scores.argmax(1) == [0, 0, 0, 1, 1, 0]).all() and (heard.start == range(6)).all() and heard.seconds == heard.hop == 1
    assert np.allclose(heard.spans, [[k, k + 1] for k in range(6)]) and np.allclose(heard.mean, heard.scores.mean(0)) and heard.top(1).tags == ("low",)


@pytest.mark.parametrize("hop, count", [(.25, 23), (1., 6), (2., 3), (None, 6)])
def test_windows_start_every_hop_and_none_is_padded(hop, count):
    heard, tagger = tag(listener(), SONG, hop, batch=4), listener()
    assert len(heard.scores) == count and heard.start[-1] + 1 <= len(SONG) / RATE
    for start, scores in zip(heard.start, heard.scores):
        first = round(start * RATE)
        assert np.allclose(scores, tagger(SONG[None, first:first + RATE]).sigmoid()[0].detach(), atol=1e-6)


def test_where_nobody_listened_nothing_is_said():
    """A hop longer than a window leaves gaps: no time before the recording, no stretch across a gap, nothing drawn in it."""
    heard = tag(listener(), SONG, hop=2.)
    assert np.allclose(heard.spans, [[0, 1], [2, 3], [4, 5]])
    certain = Tagged(heard.tags, np.ones_like(heard.scores), heard.start, heard.seconds, heard.hop)
    assert "0:00.0–0:01.0, 0:02.0–0:03.0, 0:04.0–0:05.0" in printed(certain) and "0:00.0–0:06.0" in printed(tag(listener(), SONG), sure=0.)
    drawn = taggram(certain).axes[0].collections[0].get_array()
    assert drawn.mask[:, 1::2].all() and not drawn.mask[:, ::2].any()


def test_a_file_is_resampled_and_mixed_down(tmp_path):
    loud = audio.resample(SONG, RATE, 22_050).numpy()
    soundfile.write(tmp_path / "song.flac", np.stack([loud, loud], 1) * .5, 22_050)
    assert np.allclose(tag(listener(), tmp_path / "song.flac").scores, tag(listener(), SONG).scores, atol=.01)


@pytest.mark.parametrize("wave, hop, message", [(SONG[:RATE - 1], None, "hears 1.00 s at a time"), (SONG, 0., "got a hop of 0.0 s"), (SONG, -1., "got a hop"),
                                                (SONG, float("nan"), "got a hop of nan s"), (SONG, float("inf"), "got a hop of inf s")])
def test_too_short_and_no_hop(wave, hop, message):
    with pytest.raises(ValueError, match=message): tag(listener(), wave, hop)


def test_batch_normalisation_stands_still(small):
    """Mutation: a tagger in training mode, which would answer from the batch and change as it listens."""
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    scores = tag(small.train(), .1 * torch.randn(4 * small.n_samples)).scores
    assert all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items()) and scores.shape == (4, 3)
    small.eval = lambda: small
    tag(small.train(), .1 * torch.randn(4 * small.n_samples))
    assert not all(torch.equal(before[name], tensor) for name, tensor in small.state_dict().items())


# In words and pictures ---------------------------------------------------------------------------------------------------------------------------


def test_the_table_says_when():
    lines = printed(tag(listener(), SONG)).splitlines()
    assert lines[1].split() == ["low", "0.67", "1.00", "0:00.5", "0:00.0–0:03.0,", "0:05.0–0:06.0"] and lines[2].split()[-1] == "0:03.0–0:05.0"
    assert printed(tag(listener(), SONG), most=1, sure=1.1).splitlines()[1:] == [lines[1].split("0:00.5")[0] + "0:00.5  –"]


def test_csv_and_picture(tmp_path):
    heard = tag(listener(), SONG)
    for name in ("it.csv", "it.png"): save(heard, tmp_path / name)
    with open(tmp_path / "it.csv", encoding="utf8", newline="") as file: rows = list(csv.reader(file))
    assert rows[0] == ["from_s", "to_s", "low", "high"] and np.allclose(np.array(rows[1:], float)[:, 2:], heard.scores, atol=1e-4)
    assert (tmp_path / "it.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="got it.txt, wanted"): save(heard, tmp_path / "it.txt")


def test_the_taggram_stands_in_its_place():
    import matplotlib.pyplot as plt
    figure = taggram(tag(listener(), SONG, hop=.5), title="a song")
    mesh, = figure.axes[0].collections
    titles = [figure.axes[0].get_title(where) for where in ("left", "center", "right")] # where it stands is the style's affair
    assert "a song" in titles and [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["low", "high"]
    assert np.allclose(mesh.get_coordinates()[0, [0, -1], 0], [.25, 6.25]) and mesh.get_array()[:, ::2].shape == (2, 12)
    plt.close(figure)


# The command -------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def song(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("song.wav", .5 * SONG.numpy(), RATE)
    return "song.wav"


def test_the_command_prints_and_draws(small, song, capsys):
    save_tagger("t.safetensors", small)
    assert reproduce.main(["tag", song, "--tagger", "t.safetensors", "--out", "it.csv", "--out", "it.png", "--hop", "1", "--top", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and said[-1] == "the read-out: clips 3"
    with open("it.csv", encoding="utf8") as file: assert len(file.readlines()) == 1 + 4


def test_any_encoder_gets_a_read_out(song, capsys):
    assert reproduce.main(["tag", song, "--encoder", "mfcc:8k", "--profile", "test", "--keep", "kept.safetensors"]) == 0
    first = capsys.readouterr().out
    assert "the read-out: data ScoreBox, clips 60, test clips 12, PR-AUC" in first and len(load_tagger("kept.safetensors").tags) == 22
    assert reproduce.main(["tag", song, "--tagger", "kept.safetensors"]) == 0 and capsys.readouterr().out == first


@pytest.mark.parametrize("words, message", [
    (["song.wav"], "or --encoder WHAT"), (["absent.wav", "--encoder", "mfcc:8k"], "no such file"),
    (["song.wav", "--tagger", "absent.safetensors"], "there is no file absent.safetensors"), (["song.wav", "--encoder", "vggish"], "no encoder 'vggish'"),
    (["song.wav", "--tagger", "t.safetensors", "--keep", "k.safetensors"], "--keep is for"),
    (["song.wav", "--encoder", "mfcc:8k", "--out", "it.txt"], "--out: got it.txt, wanted a name that ends in .csv"),
    (["song.wav", "--tagger", "t.safetensors", "--top", "0"], "--top: got 0"), (["song.wav", "--tagger", "t.safetensors", "--hop", "nan"], "--hop: got nan"), (["song.wav", "--encoder", "mfcc:8k", "--profile", "huge"], "huge")])
def test_refusals_are_one_line(words, message, song, capsys):
    assert reproduce.main(["tag", *words]) == 1
    said = capsys.readouterr().err
    assert said.startswith("musicssl: ") and message in said


def test_a_window_longer_than_a_clip_is_refused():
    encoder = zoo.new_encoder("samplecnn:8k-eighth")
    with pytest.raises(ValueError, match="hears 2.6 s at a time, a clip lasts 2 s"): fit_tagger(encoder, Sizes(10, 2., 12, 1.), progress=False)


def test_the_read_out_learns_which_instruments_play(monkeypatch):
    """Mutation: training clips carry each other's tags; there is then nothing to learn."""
    opened, sizes = room.open_dataset, Sizes(60, 4., 12, 1.)
    def mixed_up(*what):
        sounds = opened(*what)
        ids = sounds.ids("train")
        sounds.tags[ids] = sounds.tags[np.random.default_rng(0).permutation(ids)]
        return sounds
    learned = fit_tagger(zoo.new_encoder("mfcc:8k"), sizes, progress=False).about
    monkeypatch.setattr(room, "open_dataset", mixed_up)
    nothing = fit_tagger(zoo.new_encoder("mfcc:8k"), sizes, progress=False).about
    assert learned["clips"] == 60 and learned["PR-AUC"] > nothing["PR-AUC"] + .1 and learned["by chance"] < learned["PR-AUC"] - .1
