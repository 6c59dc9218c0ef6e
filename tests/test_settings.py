"""Slips in `settings.ini` are said in a line that names the file and the line's number."""
import configparser

import pytest

from musicssl import reproduce, settings

SLIPS = { # what is written below "[test]" and a setting; what is said of it
    "no sign": ("seeds 0", "line 3: got 'seeds 0', wanted [section] or name = value"),
    "no bracket": ("[test.clmr", "line 3: got '[test.clmr', wanted [section] or name = value"),
    "two slips": ("steps = 2\nseeds 0\n'batch' 4", "line 4: got 'seeds 0', wanted [section] or name = value"),
    "the same setting": ("seeds = 0\n\nclips = 6", "line 5: 'clips = 6' sets clips in [test] for the second time"),
    "the same section": ("[test.clmr]\n[test]", "line 4: '[test]' stands here for the second time"),
}


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """What the command says when the file reads so."""
    monkeypatch.setenv("MUSICSSL_ROOT", str(tmp_path))
    monkeypatch.delenv("MUSICSSL_PROFILE")
    def say(text):
        (tmp_path / "settings.ini").write_text(text)
        assert reproduce.main(["reproduce"]) == 1
        return capsys.readouterr().err
    return say


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_said_in_a_line(name, said, tmp_path):
    text, message = SLIPS[name]
    assert said(f"[test]\nclips = 4\n{text}\n") == f"musicssl: {tmp_path / 'settings.ini'}, {message}\n"


def test_a_setting_above_all_sections(said, tmp_path):
    assert said("# no section\nclips = 4\n[test]\n") == f"musicssl: {tmp_path / 'settings.ini'}, line 2: 'clips = 4' stands above the first [section]\n"


def test_mutation_an_error_as_the_parser_raises_it(said, monkeypatch):
    """Nobody translates it: the command ends in a traceback."""
    def plain():
        parser = configparser.ConfigParser(interpolation=None)
        parser.read(settings.root() / "settings.ini", encoding="utf8")
        return parser
    monkeypatch.setattr(settings, "_parser", plain)
    with pytest.raises(configparser.ParsingError): said("[test]\nseeds 0\n")


def test_whole_paths_need_no_project(tmp_path, monkeypatch):
    """Who installed the library alone and says where things lie has no settings.ini."""
    def nowhere(): raise FileNotFoundError("no settings.ini")
    monkeypatch.setattr(settings, "root", nowhere)
    for name in ("DATASETS", "FIGURES", "CACHE"): monkeypatch.setenv(f"MUSICSSL_{name}", str(tmp_path / name))
    assert settings.datasets_dir() == tmp_path / "DATASETS" and settings.figures_dir("test") == tmp_path / "FIGURES/test" and settings.cache_dir() == tmp_path / "CACHE"
    monkeypatch.setenv("MUSICSSL_DATASETS", "sets")
    with pytest.raises(FileNotFoundError, match="no settings.ini"): settings.datasets_dir()
