"""The sampler against a soundfont we build ourselves, sample by sample, and against its own promises."""
import importlib.util
import struct

import numpy as np
import pytest

from musicssl.data import sampler
from musicssl.data.sampler import INSTRUMENTS, PROGRAMS_OUT_OF_TUNE, Sampler, SoundFont, cents_off, notes_array, pitch_of, soundfont_path

RATE, PERIOD = 22050, 100 # the recording below is a sine of 220.5 Hz, 20 periods, the last of them looped


def soundfont(path, instrument, preset, correction=0):
    """A file of one preset: `instrument` and `preset` are lists of zones, a zone a list of (generator, 16-bit value)."""
    chunk = lambda name, body: name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    name = lambda text: text.encode().ljust(20, b"\0")

    def tables(zones):
        bags, generators = b"", b""
        for zone in zones + [[]]:
            bags += struct.pack("<HH", len(generators) // 4, 0)
            for number, value in zone: generators += struct.pack("<Hh" if value < 0 else "<HH", number, value)
        return bags, generators + struct.pack("<HH", 0, 0)

    wave = np.round(16000 * np.sin(2 * np.pi * np.arange(20 * PERIOD + 50) / PERIOD)).astype("<i2").tobytes()
    pbag, pgen = tables(preset)
    ibag, igen = tables(instrument)
    header = lambda *values: struct.pack("<20sHHHIII", *values)
    lists = {b"phdr": header(name("Sine"), 5, 0, 0, 0, 0, 0) + header(name("EOP"), 0, 0, len(preset), 0, 0, 0),
             b"pbag": pbag, b"pgen": pgen, b"inst": struct.pack("<20sH", name("sine"), 0) + struct.pack("<20sH", name("EOI"), len(instrument)),
             b"ibag": ibag, b"igen": igen,
             b"shdr": struct.pack("<20sIIIIIBbHH", name("one"), 0, 20 * PERIOD + 10, 19 * PERIOD, 20 * PERIOD, RATE, 57, correction, 0, 1)
                      + struct.pack("<20sIIIIIBbHH", name("EOS"), 0, 0, 0, 0, 0, 0, 0, 0, 0)}
    body = b"sfbk" + chunk(b"LIST", b"sdta" + chunk(b"smpl", wave)) + chunk(b"LIST", b"pdta" + b"".join(chunk(*c) for c in lists.items()))
    path.write_bytes(chunk(b"RIFF", body))
    return path


SAMPLE, LOOP, COARSE, FINE, ROOT, KEYS, INSTRUMENT, RELEASE, SUSTAIN, DECAY, ATTENUATION = 53, 54, 51, 52, 58, 43, 41, 38, 37, 36, 48
LOOPED = [[(LOOP, 1), (SAMPLE, 0)]]
PLAIN = [[(INSTRUMENT, 0)]]


@pytest.mark.parametrize("instrument, preset, correction, semitones", [
    (LOOPED, PLAIN, 0, 0),
    (LOOPED, PLAIN, -30, -.3), # the recording's own correction
    ([[(FINE, 20), (LOOP, 1), (SAMPLE, 0)]], PLAIN, 0, .2),
    ([[(FINE, 20), (LOOP, 1), (SAMPLE, 0)]], [[(FINE, 15), (COARSE, 12), (INSTRUMENT, 0)]], 0, 12.35), # a preset adds
    ([[(FINE, 20)], [(LOOP, 1), (SAMPLE, 0)]], [[(COARSE, -5)], [(INSTRUMENT, 0)]], 0, -4.8), # global zones
    ([[(FINE, 20)], [(FINE, -10), (LOOP, 1), (SAMPLE, 0)]], PLAIN, 0, -.1), # a zone overrides its global zone
    ([[(ROOT, 69), (LOOP, 1), (SAMPLE, 0)]], PLAIN, 0, -12),
])
def test_pitch_follows_the_generators(tmp_path, instrument, preset, correction, semitones):
    play = Sampler(soundfont(tmp_path / "sine.sf2", instrument, preset, correction), RATE)
    wave = play.render([(0, 2, 62, 127, 0, 5)], 2 * RATE) # twenty times as long as the recording
    wanted = RATE / PERIOD * 2 ** ((62 - 57 + semitones) / 12)
    assert abs(1200 * np.log2(pitch_of(wave[RATE // 2:], RATE) / wanted)) < .5


def test_a_looped_sine_stays_a_sine(tmp_path):
    wave = Sampler(soundfont(tmp_path / "sine.sf2", LOOPED, PLAIN), RATE).render([(0, 1, 57, 127, 0, 5)], RATE)[2000:20000]
    ideal = np.sin(2 * np.pi * np.arange(2000, 20000) / PERIOD)
    level = wave @ ideal / (ideal @ ideal)
    assert level == pytest.approx(16000 / 32768 / 2 ** .5, rel=.01) # the mean of two channels at constant power
    assert np.abs(wave - level * ideal).max() < .004


def test_envelope_follows_the_generators(tmp_path):
    zone = [[(DECAY, 0), (SUSTAIN, 300), (ATTENUATION, 100), (LOOP, 1), (SAMPLE, 0)]] # 1 s per 100 dB down to 30 dB, 4 dB taken off
    font = SoundFont(soundfont(tmp_path / "sine.sf2", zone, PLAIN))
    gain = sampler.envelope(font.zones(0, 5, 57)[0], RATE, RATE)[[RATE // 10, RATE // 5, RATE // 2]]
    np.testing.assert_allclose(20 * np.log10(gain), [-14, -24, -34], atol=.3)


def test_the_release_ends_the_note(tmp_path):
    play = Sampler(soundfont(tmp_path / "sine.sf2", [[(RELEASE, -1200), (LOOP, 1), (SAMPLE, 0)]], PLAIN), RATE) # 0.5 s per 100 dB
    wave = play.render([(0, .5, 57, 127, 0, 5)], RATE)
    level = lambda start: np.sqrt((wave[round(start * RATE):round((start + .03) * RATE)] ** 2).mean())
    assert 20 * np.log10(level(.6) / level(.4)) == pytest.approx(-20 - 3, abs=2)
    assert np.abs(wave[round(.82 * RATE):]).max() < 1e-4


def test_key_ranges_of_both_layers_meet(tmp_path):
    font = SoundFont(soundfont(tmp_path / "sine.sf2", [[(KEYS, 40 | 70 << 8), (SAMPLE, 0)]], [[(KEYS, 60 | 90 << 8), (INSTRUMENT, 0)]]))
    assert font.presets[0, 5].zones[0].keys == (60, 70) and font.presets[0, 5].name == "Sine"
    for key in (59, 71):
        with pytest.raises(ValueError, match=f"no sound for key {key}"): font.zones(0, 5, key)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"RIFF\x04\0\0\0WAVE", b"not a soundfont at all"])
def test_other_files_are_refused_by_name(tmp_path, content):
    (tmp_path / "bad.sf2").write_bytes(content)
    with pytest.raises(ValueError, match="bad.sf2 is not a SoundFont 2 file"): SoundFont(tmp_path / "bad.sf2")


def test_a_missing_or_changed_soundfont_is_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(FileNotFoundError, match=r'pip install "musicssl\[data\]"'): soundfont_path()
    monkeypatch.setattr(sampler, "SOUNDFONT_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="has SHA-256 82475b91a76d"): soundfont_path()


@pytest.fixture(scope="module")
def play(): return Sampler()


def test_the_past_changes_nothing(play):
    short, long, other = [(0, .1, 64, 80, 0, 40)], [(0, 1.2, 64, 80, 0, 40)], [(0, .7, 64, 80, 0, 40, 1, 0, 13)]
    fresh = [Sampler().render(notes, 44100) for notes in (short, long, other)]
    for order in ((0, 1, 2), (2, 1, 0), (1, 1, 0)):
        for i in order: np.testing.assert_array_equal(play.render((short, long, other)[i], 44100), fresh[i])


def test_detuning_is_in_cents(play):
    tone = lambda cents: pitch_of(play.render([(0, 1, 69, 80, 0, 40, 1, 0, cents)], RATE)[2205:], RATE)
    assert 1200 * np.log2(tone(25) / tone(-25)) == pytest.approx(50, abs=1)


def test_panning_and_velocity_set_the_level(play):
    peak = lambda velocity, pan: np.abs(play.render([(0, .5, 69, velocity, 0, 73, 1, pan)], RATE // 2)).max()
    assert peak(80, 0) / peak(40, 0) == pytest.approx(4, rel=1e-4)
    assert peak(80, 0) / peak(80, -1) == pytest.approx(2 ** .5, rel=1e-2) # hard left: one channel only


def test_no_click_at_the_end_of_a_note(play):
    for program in (0, 19, 40, 48, 73):
        wave = play.render([(0, .5, 60, 90, 0, program)], RATE)
        inside, after = np.abs(np.diff(wave[6000:11000], 2)).max(), np.abs(np.diff(wave[11000:], 2)).max()
        assert after < 1.2 * inside, program


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_every_key_of_every_instrument_sounds_in_tune(play, name):
    i = INSTRUMENTS[name]
    for program in i.programs:
        assert i.bank == 128 or program not in PROGRAMS_OUT_OF_TUNE
        for key in range(i.low, i.high + 1):
            for velocity in (20, 60, 127): play.font.zones(i.bank, program, key, velocity)
        for key in range(i.low, i.high + 1, 4):
            wave = play.render([(0, 1, key, 90, i.bank, program)], RATE)
            assert np.isfinite(wave).all() and np.abs(wave).max() > .01, (program, key)
            if i.bank == 0: assert abs(cents_off(pitch_of(wave[2205:], RATE), key)) < 25, (program, key)


def test_notes_get_their_defaults_and_empty_is_silence(play):
    assert notes_array([(0, 1, 60)]).tolist() == [[0, 1, 60, 80, 0, 0, 1, 0, 0]]
    assert notes_array([]).shape == (0, 9)
    assert not play.render([], 100).any() and len(play.render([(5, 1, 60)], 100)) == 100


def test_what_cannot_be_played_is_refused(play):
    with pytest.raises(ValueError, match="note 0 cannot be played"): play.render([(float("nan"), 1, 60)], 100)
    with pytest.raises(ValueError, match="no program 3 in bank 9"): play.render([(0, 1, 60, 80, 9, 3)], 100)


def test_the_rate_moves_no_pitch(play):
    """24 kHz is rendered, not resampled: every program sounds at the same frequency."""
    wide = Sampler(sample_rate=24_000)
    for instrument in INSTRUMENTS.values():
        for program in instrument.programs if instrument.bank == 0 else ():
            key = (instrument.low + instrument.high) // 2
            tones = ((s.render([(0, 1, key, 90, 0, program)], s.sample_rate)[s.sample_rate // 10:], s.sample_rate) for s in (wide, play))
            ours, theirs = (pitch_of(*tone) for tone in tones)
            assert abs(1200 * np.log2(ours / theirs)) < 1, (program, ours, theirs)
            assert abs(cents_off(ours, key)) < 25, (program, ours)
