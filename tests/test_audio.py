"""R5-R9: truncated, corrupt, not finite, odd formats, too short. Each fault is injected into a file and must be named, counted or cured."""
import json
import os
import pickle
import struct
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile as sf
import torch
from scipy.signal import resample as fourier_resample

from musicssl import audio
from musicssl.audio import (NotFiniteAudio, Quarantine, TooManyBadFiles, TooShortAudio, TruncatedAudio, UnreadableAudio, info,
                            is_silent, read, read_many, resample, resample_on_device, resampled_length)

RATE, SECONDS = 22050, 4


def noise(seconds=SECONDS, rate=RATE, seed=0):
    return (np.random.default_rng(seed).standard_normal(int(seconds * rate)) * .1).astype(np.float32)


def tones(rate, seconds=2):
    t = np.arange(int(seconds * rate)) / rate
    swell = np.sin(np.pi * t / seconds) ** 2
    return (swell * sum(.2 * np.sin(2 * np.pi * f * t + f) for f in (220, 1000, 2900))).astype(np.float32)


def decibels(got, wanted):
    assert len(got) == len(wanted)
    return 20 * np.log10(np.linalg.norm(np.asarray(got) - np.asarray(wanted)) / np.linalg.norm(wanted) + 1e-12)


def late(got, wanted):
    """Samples by which one wave comes after the other, where they are most alike."""
    n = len(wanted)
    alike = np.fft.irfft(np.fft.rfft(got, 2 * n) * np.conj(np.fft.rfft(wanted, 2 * n)))
    best = int(np.argmax(alike))
    return best if best < n else best - 2 * n


def cut(path, share=.5):
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])


UNCOMPRESSED = [("a.wav", "WAV", "PCM_16"), ("a.wav", "WAV", "FLOAT"), ("a.wav", "WAVEX", "PCM_24"), ("a.wav", "RF64", "PCM_16"),
                ("a.w64", "W64", "PCM_16"), ("a.aiff", "AIFF", "PCM_16"), ("a.au", "AU", "PCM_16")]


# R5: truncated files

@pytest.mark.parametrize("share", [.999, .5, .1])
@pytest.mark.parametrize("name, container, subtype", UNCOMPRESSED, ids=[f"{c}-{s}" for _, c, s in UNCOMPRESSED])
def test_truncated_uncompressed(tmp_path, name, container, subtype, share):
    path = tmp_path / name
    sf.write(path, noise(), RATE, format=container, subtype=subtype)
    assert len(read(path, RATE)) == SECONDS * RATE and info(path).promised == info(path).frames
    cut(path, share)
    assert len(sf.read(path)[0]) < SECONDS * RATE, "soundfile is silent about it, which is why we must not be"
    with pytest.raises(TruncatedAudio, match=name): read(path, RATE)
    with pytest.raises(TruncatedAudio): read(path, 8000, start=0., seconds=.1)


def test_truncated_mp3(tmp_path):
    path = tmp_path / "a.mp3"
    sf.write(path, noise(10), RATE)
    assert len(read(path, RATE)) == 10 * RATE
    cut(path)
    assert len(sf.read(path)[0]) < 6 * RATE
    with pytest.raises(TruncatedAudio, match="promises 10.000 s"): read(path, RATE)
    with pytest.raises(TruncatedAudio): read(path, RATE, start=8., seconds=1.)
    assert len(read(path, RATE, start=1., seconds=1.)) == RATE


def test_truncated_flac(tmp_path):
    path = tmp_path / "a.flac"
    sf.write(path, noise(), RATE)
    cut(path)
    with pytest.raises((TruncatedAudio, UnreadableAudio), match="a.flac"): read(path, RATE)


@pytest.mark.parametrize("subtype, rate", [("VORBIS", RATE), ("OPUS", 48000)])
def test_truncated_ogg(tmp_path, subtype, rate):
    """Anywhere: in the middle, at the border of two pages, one byte before the end."""
    path = tmp_path / "a.ogg"
    sf.write(path, noise(10, rate), rate, format="OGG", subtype=subtype)
    whole = path.read_bytes()
    assert len(read(path, rate)) == 10 * rate
    for end in (len(whole) // 2, whole.rfind(b"OggS"), len(whole) - 1):
        path.write_bytes(whole[:end])
        assert len(sf.read(path)[0]) < 10 * rate, "soundfile is silent about it"
        with pytest.raises(TruncatedAudio, match="a.ogg.*without its mark of the end"): read(path, rate)
        with pytest.raises(TruncatedAudio): read(path, rate, start=0., seconds=.1)


def without_length(path):
    """Take off an MP3's first frame, which holds no sound but the length and the coder's delay."""
    data = path.read_bytes()
    assert {b"Xing", b"Info"} & {data[k:k + 4] for k in range(64)}
    path.write_bytes(data[data.index(data[:2], 4):])


def test_an_mp3_without_its_length_promises_nothing(tmp_path):
    """What the notebook says of such files: when this fails, they have become readable and the notebook is to be changed."""
    path = tmp_path / "a.mp3"
    wave = noise(10, 44100)
    wave[len(wave) // 2:] *= .001
    sf.write(path, wave, 44100, bitrate_mode="CONSTANT")
    without_length(path)
    assert late(read(path, 44100)[:len(wave)], wave) == 1105
    cut(path)
    assert len(read(path, 44100)) < 6 * 44100, "a cut goes unnoticed"
    sf.write(path, wave, 44100, bitrate_mode="VARIABLE", compression_level=.3)
    without_length(path)
    assert len(read(path, 44100)) < 6 * 44100, "the end of a variable rate is lost"


def test_a_flac_of_unknown_length(tmp_path):
    """A stream's header says 0 samples: reading it whole asked for more memory than there is, with an error of no type."""
    path = tmp_path / "a.flac"
    sf.write(path, noise(), RATE)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(UnreadableAudio, match="a.flac.*does not say how long"): read(path, RATE)
    with pytest.raises(UnreadableAudio): info(path)


def test_a_stream_of_unknown_length_is_whole(tmp_path):
    path = tmp_path / "stream.wav"
    sf.write(path, noise(), RATE)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = struct.pack("<I", 2**32 - 1)
    path.write_bytes(data)
    assert len(read(path, RATE)) == SECONDS * RATE


def test_trailing_tags_are_not_a_truncation(tmp_path):
    for name in ("a.wav", "a.mp3", "a.ogg"):
        sf.write(tmp_path / name, noise(), RATE)
        with open(tmp_path / name, "ab") as file: file.write(b"TAG" + bytes(125))
        assert len(read(tmp_path / name, RATE)) == SECONDS * RATE


# R6: corrupt files and files that are no audio

def scratch(path):
    data = bytearray(path.read_bytes())
    for i in range(len(data) // 2, len(data) // 2 + 4000): data[i] ^= 0x5A
    path.write_bytes(data)


def test_corrupt(tmp_path):
    for name in ("a.flac", "a.mp3"):
        sf.write(tmp_path / name, noise(10), RATE)
        scratch(tmp_path / name)
        with pytest.raises((UnreadableAudio, TruncatedAudio), match=name): read(tmp_path / name, RATE)


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.flac", "a.raw", "a"])
@pytest.mark.parametrize("content", [b"", b"not audio", b"RIFF", bytes(5000), b"not audio " * 3000], ids=["empty", "text", "stub", "zeros", "long"])
def test_not_audio(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableAudio, match=name): read(tmp_path / name, RATE)


def test_a_companion_file_of_a_mac_is_no_obstacle(tmp_path):
    """libsndfile takes `._a.mp3` for a resource fork of `a.mp3` and refuses both."""
    for kind in ("mp3", "wav", "flac", "ogg"):
        sf.write(path := tmp_path / f"a.{kind}", noise(), 22050)
        alone = read(path, 22050)
        path.with_name(f"._a.{kind}").write_bytes(b"\0\5\x16\7" + bytes(500))
        assert torch.equal(read(path, 22050), alone)


def test_missing_and_folder(tmp_path):
    with pytest.raises(UnreadableAudio, match="no such file"): read(tmp_path / "a.wav", RATE)
    with pytest.raises(UnreadableAudio): read(tmp_path, RATE)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "a.wav").touch()
    with pytest.raises(UnreadableAudio, match="0 bytes"): info(tmp_path / "a.wav")


def folder_with_faults(folder, good, bad):
    for k in range(good): sf.write(folder / f"good{k:03d}.wav", noise(.1, 8000, k), 8000)
    for k in range(bad): (folder / f"bad{k:03d}.wav").write_bytes(b"not audio")
    return sorted(folder.iterdir(), reverse=True)


def test_skip_and_count_up_to_the_limit(tmp_path):
    paths = folder_with_faults(tmp_path, 198, 2)
    ward = Quarantine()
    assert len(list(read_many(paths, 8000, quarantine=ward))) == 198
    assert ward.counts() == {"UnreadableAudio": 2} and list(ward.report().file) == ["bad001.wav", "bad000.wav"]


def test_stop_above_the_limit(tmp_path):
    paths = folder_with_faults(tmp_path, 197, 3)
    with pytest.raises(TooManyBadFiles, match="3 of 200 files are bad .3 UnreadableAudio.*1.00%.*bad00"):
        list(read_many(paths, 8000, quarantine=Quarantine()))
    with pytest.raises(TooManyBadFiles): list(read_many(iter(paths), 8000, quarantine=Quarantine()))


def test_stop_at_once_when_the_total_is_known(tmp_path):
    paths = folder_with_faults(tmp_path, 5, 5)[::-1]
    ward = Quarantine(limit=.2)
    with pytest.raises(TooManyBadFiles): list(read_many(paths, 8000, quarantine=ward))
    assert len(ward.seen) == 3


def test_without_a_quarantine_the_first_fault_stops(tmp_path):
    with pytest.raises(UnreadableAudio): list(read_many(folder_with_faults(tmp_path, 3, 1), 8000))


def test_a_second_epoch_counts_nothing_twice(tmp_path):
    paths = folder_with_faults(tmp_path, 99, 1)
    ward = Quarantine()
    for _ in range(3): assert len(list(read_many(paths, 8000, quarantine=ward))) == 99
    assert len(ward.seen) == 100 and ward.counts() == {"UnreadableAudio": 1}


def test_other_errors_pass_the_quarantine():
    with pytest.raises(ZeroDivisionError), Quarantine(limit=1.).guard("a.wav"): 1 / 0


def test_the_list_is_saved_whole(tmp_path):
    ward = Quarantine(limit=1.)
    with ward.guard(tmp_path / "a.wav"): read(tmp_path / "a.wav", RATE)
    ward.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["seen"] == 1 and saved["files"][0]["file"] == "a.wav" and saved["files"][0]["problem"] == "UnreadableAudio"
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("kind", [UnreadableAudio, TruncatedAudio, NotFiniteAudio, TooShortAudio])
def test_errors_cross_process_borders(kind):
    error = pickle.loads(pickle.dumps(kind("x/a.wav", "is bad")))
    assert type(error) is kind and error.path.name == "a.wav" and str(error) == "x/a.wav: is bad" and isinstance(error, ValueError)


# R7: NaN, infinity, silence

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 5, -1])
def test_not_finite(tmp_path, value, where):
    wave = noise()
    wave[where] = value
    sf.write(tmp_path / "a.wav", np.stack([wave, noise(seed=1)], 1), RATE, subtype="FLOAT")
    with pytest.raises(NotFiniteAudio, match="a.wav: 1 samples"): read(tmp_path / "a.wav", 16000)


def test_opposite_infinities_do_not_cancel(tmp_path):
    wave = noise()
    wave[7] = np.inf
    sf.write(tmp_path / "a.wav", np.stack([wave, -wave], 1), RATE, subtype="FLOAT")
    with pytest.raises(NotFiniteAudio): read(tmp_path / "a.wav", RATE)


@pytest.mark.parametrize("wave, silent", [(np.zeros(8000), True), (np.full(8000, .5), True), (noise() * 1e-5, True), (noise() * .01, False)],
                         ids=["zeros", "offset", "very soft", "soft"])
def test_silent_clips_are_flagged_and_kept(tmp_path, wave, silent):
    sf.write(tmp_path / "a.wav", wave, 8000, subtype="FLOAT")
    ward = Quarantine(limit=0.)
    assert len(list(read_many([tmp_path / "a.wav"], 8000, quarantine=ward))) == 1
    assert ward.counts() == ({"silent": 1} if silent else {})


def test_silence_row_by_row():
    assert is_silent(torch.tensor([[0., 0.], [1., -1.]])).tolist() == [True, False]


# R8: one content, many formats

ODD = {"stereo": (44100, 2, "WAV", "PCM_16"), "5.1": (48000, 6, "WAVEX", "PCM_24"), "96 kHz": (96000, 1, "WAV", "PCM_24"),
       "8 kHz": (8000, 1, "WAV", "PCM_16"), "float": (44100, 1, "WAV", "FLOAT"), "double": (44100, 1, "WAV", "DOUBLE"),
       "24 bit": (22050, 1, "FLAC", "PCM_24"), "flac": (44100, 2, "FLAC", "PCM_16"), "aiff": (32000, 1, "AIFF", "PCM_16"),
       "11 kHz": (11025, 1, "WAV", "PCM_16")}


@pytest.mark.parametrize("guise", ODD)
@pytest.mark.parametrize("target", [22050, 16000, 24000, 8000])
def test_same_content_same_clip(tmp_path, guise, target):
    rate, channels, container, subtype = ODD[guise]
    sf.write(tmp_path / "a", np.stack([tones(rate)] * channels, 1), rate, format=container, subtype=subtype)
    wave = read(tmp_path / "a", target)
    assert wave.dtype == torch.float32 and wave.ndim == 1 and decibels(wave, tones(target)) < -60


# Acceptance: WAV, FLAC, MP3 and Ogg at 8, 44.1 and 96 kHz, mono, stereo and 5.1, 8 to 32 bit.

RATES, CHANNELS, MODEL_RATE = (8000, 44100, 96000), (1, 2, 6), 22050
ENCODINGS = [("WAV", subtype) for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")] + \
            [("FLAC", subtype) for subtype in ("PCM_S8", "PCM_16", "PCM_24")] + [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
MATRIX = [(container, subtype, rate, channels) for container, subtype in ENCODINGS for channels in CHANNELS
          for rate in (*RATES, *([48000] if subtype in ("OPUS", "MPEG_LAYER_III") else []))] # 48 kHz: the highest of those without 96


def impossible(container, subtype, rate, channels):
    """Why a format cannot hold this, or nothing when it can."""
    if container == "MP3" and channels > 2: return "MPEG audio of this kind has one or two channels"
    if container == "MP3" and rate > 48000: return "MPEG audio ends at 48 kHz"
    if subtype == "OPUS" and rate not in (8000, 12000, 16000, 24000, 48000): return "Opus knows five rates: 8, 12, 16, 24 and 48 kHz"


def eight_bits(rate):
    """The error eight bits must make, in dB of our tones: noise of 1/128 / sqrt(12), of which resampling keeps what lies below 11,025 Hz."""
    noise = 20 * np.log10(1 / 128 / 12**.5 / np.sqrt(np.mean(tones(rate)**2)))
    return noise - 10 * np.log10(max(1., rate / MODEL_RATE))


def bound(container, subtype, rate, channels):
    """Largest difference to the original, dB; more than -60 where the format itself, at its best setting, does no better: measured."""
    if subtype in ("PCM_U8", "PCM_S8"): return eight_bits(rate) + .5
    if container == "MP3": return -58 if rate == 8000 else -49
    if channels == 6 and (subtype == "OPUS" or rate == 44100) and container == "OGG": return -17    # coders keep only deep sounds of the sixth
    if container == "OGG": return {8000: -41, 44100: -39, 48000: -40, 96000: -37}[rate]
    return -60


def encode(path, container, subtype, rate, channels):
    """Our tones in a file, at the format's best quality; eight bits are rounded here, for libsndfile cuts them off."""
    wave = np.round(tones(rate) * 128) / 128 if subtype in ("PCM_U8", "PCM_S8") else tones(rate)
    best = {"compression_level": 0.} if container in ("OGG", "MP3") else {}
    container = "WAVEX" if container == "WAV" and channels > 2 else container
    sf.write(path, np.stack([wave] * channels, 1), rate, format=container, subtype=subtype, **best)


def against_the_codec(clip, path):
    """Our clip against the codec's own decoding, averaged and resampled by a Fourier transform; dB, below where filters begin."""
    samples, rate = sf.read(path, always_2d=True)
    decoded = fourier_resample(samples.mean(1), len(clip))
    audible = int(.45 * min(rate, MODEL_RATE) * len(clip) / MODEL_RATE)
    return decibels(np.fft.rfft(clip)[:audible], np.fft.rfft(decoded)[:audible])


@pytest.mark.parametrize("cell", MATRIX, ids=lambda cell: f"{cell[0]}-{cell[1]}-{cell[2]}-{cell[3]}")
def test_every_format_gives_the_same_clip(tmp_path, cell):
    """A cell is either refused by the writing library, for a reason we can name, or read to its bound, in time, and as the codec decodes it."""
    if impossible(*cell):
        with pytest.raises(sf.LibsndfileError): encode(tmp_path / "a", *cell)
        return
    encode(tmp_path / "a", *cell)
    clip, original = read(tmp_path / "a", MODEL_RATE).numpy(), tones(MODEL_RATE)
    assert len(clip) == len(original) and late(clip, original) == 0
    assert decibels(clip, original) < bound(*cell)
    assert against_the_codec(clip, tmp_path / "a") < -60


def test_every_lossless_format_of_sixteen_bits_and_more_is_held_to_sixty():
    assert all(bound(*cell) == -60 for cell in MATRIX if cell[0] in ("WAV", "FLAC") and not cell[1].endswith("8"))


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_content_of_eight_bits_survives_eight_bits(tmp_path, name):
    coarse = np.round(noise() * 128) / 128
    sf.write(tmp_path / name, coarse, RATE, subtype="PCM_U8" if name == "a.wav" else "PCM_S8")
    assert decibels(read(tmp_path / name, RATE), coarse) < -60


@pytest.mark.parametrize("name, rate", [("a.mp3", 44100), ("a.mp3", 8000), ("a.ogg", 44100), ("a.opus", 48000)])
def test_lossy_formats_are_in_time(tmp_path, name, rate):
    """Sharp sounds at known places are found there, to the sample: the coder's delay and padding are taken off."""
    clicks = np.zeros(3 * rate, np.float32)
    clicks[[rate // 2, rate, 2 * rate + 17]] = .9
    kind = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    sf.write(tmp_path / name, clicks, rate, compression_level=0., **kind)
    wave = read(tmp_path / name, rate).numpy()
    assert len(wave) == len(clicks) and late(wave, clicks) == 0
    assert sorted(np.argsort(np.abs(wave))[-3:]) == [rate // 2, rate, 2 * rate + 17]


def test_channels_are_averaged(tmp_path):
    channels = np.stack([noise(seed=k) for k in range(6)], 1)
    sf.write(tmp_path / "a.wav", channels, RATE, format="WAVEX", subtype="FLOAT")
    np.testing.assert_allclose(read(tmp_path / "a.wav", RATE), channels.mean(1), atol=1e-6)


@pytest.mark.parametrize("container, subtype, rate", [("WAV", "FLOAT", 44100), ("FLAC", "PCM_24", 48000), ("WAV", "FLOAT", 22050),
                                                      ("WAV", "FLOAT", 8000), ("MP3", None, 44100)])
@pytest.mark.parametrize("target", [22050, 16000])
def test_a_segment_is_a_slice_of_the_whole(tmp_path, container, subtype, rate, target):
    sf.write(tmp_path / "a", noise(rate=rate), rate, format=container, subtype=subtype)
    whole = read(tmp_path / "a", target)
    assert len(whole) == resampled_length(SECONDS * rate, rate, target)
    for start, seconds in ((0., 1.), (.123456, .7), (2.71828, .1), (3., 1.)):
        segment, first = read(tmp_path / "a", target, start, seconds), round(start * target)
        assert decibels(segment, whole[first:first + round(seconds * target)]) < -60


def test_only_the_segment_is_decoded(tmp_path, monkeypatch):
    sf.write(tmp_path / "a.flac", noise(60), RATE)
    counts, decode = [], audio._decode
    monkeypatch.setattr(audio, "_decode", lambda path, file, first, count: counts.append(count) or decode(path, file, first, count))
    read(tmp_path / "a.flac", 16000, 30., 1.)
    assert sum(counts) < 1.2 * RATE


@pytest.mark.parametrize("from_rate, to_rate", [(44100, 22050), (8000, 22050), (22050, 24000), (48000, 16000)])
def test_the_two_resamplers_agree(from_rate, to_rate):
    wave = torch.from_numpy(tones(from_rate)).repeat(2, 1)
    slow, fast = resample(wave, from_rate, to_rate), resample_on_device(wave, from_rate, to_rate)
    assert slow.shape == fast.shape == (2, 2 * to_rate) and decibels(fast[1], slow[1]) < -60


def test_resampling_keeps_kind_and_shape():
    assert isinstance(resample(np.zeros((2, 3, 80)), 8, 4), np.ndarray)
    assert resample(torch.zeros(2, 3, 80), 8, 4).shape == (2, 3, 40)
    with pytest.raises(ValueError, match="positive"): resample(np.zeros(8), 0, 8)


# R9: too short

def test_zero_length(tmp_path):
    sf.write(tmp_path / "a.wav", noise(0), RATE)
    for options in ({}, {"seconds": 1.}, {"seconds": 1., "pad": True}):
        with pytest.raises(TooShortAudio, match="holds 0.000 s"): read(tmp_path / "a.wav", RATE, **options)


def test_padding_is_silence_at_the_end(tmp_path):
    sf.write(tmp_path / "a.wav", noise(1), RATE, subtype="FLOAT")
    wave = read(tmp_path / "a.wav", RATE, .5, 2., pad=True)
    assert len(wave) == 2 * RATE and not wave[RATE // 2:].any()
    np.testing.assert_allclose(wave[:RATE // 2], noise(1)[RATE // 2:], atol=1e-6)


@pytest.mark.parametrize("start, seconds", [(-1., 1.), (0., 0.), (0., -1.)])
def test_times_that_make_no_sense(tmp_path, start, seconds):
    sf.write(tmp_path / "a.wav", noise(1), RATE)
    with pytest.raises(ValueError, match="wanted start >= 0"): read(tmp_path / "a.wav", RATE, start, seconds)


def some_short(folder, lengths):
    paths = []
    for k, seconds in enumerate(lengths):
        paths.append(folder / f"{k:04d}.wav")
        sf.write(paths[-1], noise(seconds, 8000), 8000)
    return paths


@pytest.mark.parametrize("lengths", [[1, .1, 1], [1, 1, .1], [.1, 1, 1]], ids=["one", "the last", "the first"])
def test_short_ones_are_dropped(tmp_path, lengths):
    paths, ward = some_short(tmp_path, lengths), Quarantine(limit=0.)
    got = [path for path, _ in read_many(paths, 8000, seconds=.5, quarantine=ward)]
    assert got == [path for path, seconds in zip(paths, lengths) if seconds == 1] and ward.counts() == {"TooShortAudio": 1}


def test_two_thousand_short_ones_in_a_row(tmp_path):
    short, long = some_short(tmp_path, [.01, 1])
    paths = []
    for k in range(2000):
        paths.append(tmp_path / f"link{k}.wav")
        os.link(short, paths[-1])
    ward = Quarantine()
    assert [path for path, _ in read_many([*paths, long], 8000, seconds=.5, quarantine=ward)] == [long]
    assert ward.counts() == {"TooShortAudio": 2000}


def test_all_short_is_an_error_that_says_so(tmp_path):
    paths = some_short(tmp_path, [.1] * 5)
    with pytest.raises(TooManyBadFiles, match="5 of 5 files are bad .5 TooShortAudio"):
        list(read_many(paths, 8000, seconds=.5, quarantine=Quarantine(limit=1.)))
    assert len(list(read_many(paths, 8000, seconds=.5, pad=True, quarantine=Quarantine()))) == 5


# Each row once more with its protection removed: the tests above must notice.

def plain(path, file, first, count):
    """The reader everybody writes first: whatever comes, averaged."""
    file.seek(first)
    return file.read(count, dtype="float32", always_2d=True).mean(1)


def first_channel(path, file, first, count):
    file.seek(first)
    return file.read(count, dtype="float32", always_2d=True)[:, 0]


def by_straight_lines(wave, from_rate, to_rate):
    return np.interp(np.arange(resampled_length(len(wave), from_rate, to_rate)) * from_rate / to_rate, np.arange(len(wave)), wave).astype(np.float32)


def without_a_margin(path, file, to_rate, first, count):
    start, end = (round(place * file.samplerate / to_rate) for place in (first, first + count))
    return resample(audio._decode(path, file, start, end - start), file.samplerate, to_rate)[:count]


def by_recursion(paths, sample_rate, start=0., seconds=None, pad=False, quarantine=None):
    """As in the companion code of the first paper: an index is tried, and when its clip is short, the next one."""
    def clip(n):
        try: return paths[n], read(paths[n], sample_rate, start, seconds, pad)
        except TooShortAudio as error:
            quarantine.flag(error.path, "TooShortAudio")
            return clip(n + 1)
    return (clip(n) for n in range(len(paths)))


def believed(file):
    """Whatever the log says was promised, streams of unknown length included."""
    return max([file.frames, *(int(said) for said, _ in audio._CORRECTED.findall(file.extra_info))])


@contextmanager
def no_guard(self, path):
    self.seen.add(str(path))
    yield


WAV = UNCOMPRESSED[0]
MUTATIONS = { # what is removed: where, its name, what stands there instead, the check
    "R5: the header's promise is not read":
        (audio, "_promised", lambda file: file.frames, lambda at: test_truncated_uncompressed(at, *WAV, .5)),
    "R5: a promise of 4 GB is believed":
        (audio, "_promised", believed, lambda at: test_a_stream_of_unknown_length_is_whole(at)),
    "R5: the decoded length is not compared":
        (audio, "_decode", plain, lambda at: test_truncated_mp3(at)),
    "R5: an MP3 may end anywhere":
        (audio, "_MP3_SLACK", 10**9, lambda at: test_truncated_mp3(at)),
    "R5: the end of an Ogg stream is not looked for":
        (audio, "_has_end", lambda path: True, lambda at: test_truncated_ogg(at, "VORBIS", RATE)),
    "R5: any page of an Ogg stream will do for its last":
        (audio, "_has_end", lambda path: b"OggS" in path.read_bytes()[-2**17:], lambda at: test_truncated_ogg(at, "OPUS", 48000)),
    "R6: opening is not guarded":
        (audio, "_opened", sf.SoundFile, lambda at: test_not_audio(at, "a.wav", b"not audio")),
    "R6: a length nobody knows is believed":
        (audio, "_opened", sf.SoundFile, lambda at: test_a_flac_of_unknown_length(at)),
    "R6: decoding is not guarded":
        (audio, "_decode", plain, lambda at: test_corrupt(at)),
    "R6: the quarantine has no limit":
        (Quarantine, "check", lambda self: None, lambda at: test_stop_above_the_limit(at)),
    "R6: the quarantine skips nothing":
        (Quarantine, "guard", no_guard, lambda at: test_skip_and_count_up_to_the_limit(at)),
    "R7: NaN passes":
        (audio, "_decode", plain, lambda at: test_not_finite(at, np.nan, 5)),
    "R7: channels are averaged before infinity is looked for":
        (audio.np, "isfinite", lambda wave: ~np.isinf(wave), lambda at: test_opposite_infinities_do_not_cancel(at)),
    "R7: nothing is silent":
        (audio, "is_silent", lambda wave: torch.tensor(False), lambda at: test_silent_clips_are_flagged_and_kept(at, np.zeros(8000), True)),
    "R7: an offset is a sound":
        (audio, "is_silent", lambda wave: wave.abs().amax() < 1e-4, lambda at: test_silent_clips_are_flagged_and_kept(at, np.full(8000, .5), True)),
    "R8: the rate stays as stored":
        (audio, "resample", lambda wave, a, b: wave, lambda at: test_same_content_same_clip(at, "96 kHz", 22050)),
    "R8: resampling by straight lines":
        (audio, "resample", by_straight_lines, lambda at: test_every_format_gives_the_same_clip(at, ("WAV", "PCM_24", 8000, 1))),
    "R8: the first channel stands for all":
        (audio, "_decode", first_channel, lambda at: test_channels_are_averaged(at)),
    "R8: the first channel stands for all six of an Ogg file":
        (audio, "_decode", first_channel, lambda at: test_every_format_gives_the_same_clip(at, ("OGG", "VORBIS", 44100, 6))),
    "R8: a segment is resampled by itself":
        (audio, "_segment", without_a_margin, lambda at: test_a_segment_is_a_slice_of_the_whole(at, "WAV", "FLOAT", 44100, 16000)),
    "R9: a short clip is passed over by recursion":
        (None, "read_many", by_recursion, lambda at: test_two_thousand_short_ones_in_a_row(at)),
    "R9: past the last clip there is another":
        (None, "read_many", by_recursion, lambda at: test_short_ones_are_dropped(at, [1, 1, .1])),
    "R9: short clips count as broken":
        (audio, "_NOT_BROKEN", (), lambda at: test_two_thousand_short_ones_in_a_row(at)),
    "R9: an empty data set is a data set":
        (Quarantine, "check", lambda self: None, lambda at: test_all_short_is_an_error_that_says_so(at)),
}
NOTICED = AssertionError, pytest.fail.Exception, sf.SoundFileError, TooManyBadFiles, ValueError, IndexError, RecursionError


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_without_its_protection_the_check_fails(tmp_path, monkeypatch, mutation):
    where, name, instead, check = MUTATIONS[mutation]
    check_passes = tmp_path / "with"
    check_passes.mkdir()
    check(check_passes)
    monkeypatch.setattr(where or sys.modules[__name__], name, instead)
    (tmp_path / "without").mkdir()
    with pytest.raises(NOTICED): check(tmp_path / "without")


def test_every_row_has_a_mutation():
    assert {mutation[:2] for mutation in MUTATIONS} == {"R5", "R6", "R7", "R8", "R9"}
