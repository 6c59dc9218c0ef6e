"""One set of versions, whichever way one installs: pyproject.toml, constraints.txt, environment.yml and the imports agree."""
import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import musicssl
from imports_of import all_imports, imports_of

try: import tomllib
except ModuleNotFoundError: import tomli as tomllib          # Python 3.10; pytest brings it there

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf8"))
CONSTRAINTS = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines() if line.strip() and not line.startswith("#")]

DISTRIBUTION = {"sklearn": "scikit-learn", "xdist": "pytest-xdist", "IPython": "ipykernel", "yaml": "pyyaml"}
BESIDES = {"fastcore", "execnb", "nbclient", "nbformat", "threadpoolctl"} # brought by nbdev, papermill and scikit-learn, and pinned too
LATE = {"torchaudio": "compat", "tokenizers": "encoders.text"}   # dependencies that `import musicssl` should not wait for
READING_ROOMS = {"report", "reproduce"}                      # need the extra `nb`
MATCH_SPEC = re.compile(r"[a-z0-9][a-z0-9._-]*(?:(?:[<>]=?|[=!~]=|=)[0-9]+(?:\.(?:[0-9]+|\*))*(?:,(?:[<>]=?|[=!~]=)[0-9]+(?:\.(?:[0-9]+|\*))*)*)?")


def requirements(extra=None):
    """Direct requirements of the project, or of an extra with the extras it includes: canonical name -> requirement."""
    lines = [Requirement(line) for line in (PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"])]
    found = {canonicalize_name(line.name): line for line in lines if line.name != "musicssl"}
    for line in lines:
        if line.name == "musicssl":
            for inner in line.extras: found |= requirements(inner)
    return found


def pythons():
    """Minor versions that `requires-python` admits."""
    allowed = SpecifierSet(PROJECT["requires-python"])
    return [f"3.{minor}" for minor in range(30) if f"3.{minor}" in allowed]


def pins(python):
    """Canonical name -> the versions pinned for a Python."""
    found = {}
    for line in map(Requirement, CONSTRAINTS):
        if line.marker is None or line.marker.evaluate({"python_version": python}):
            found.setdefault(canonicalize_name(line.name), []).append(str(line.specifier))
    return found


def conda_spec(line):
    """Name and versions of a line of conda's `dependencies`; one `=` means any release of that series."""
    if not MATCH_SPEC.fullmatch(line): raise ValueError(f"not a match spec: {line!r}")
    name, versions = re.fullmatch(r"([a-z0-9][a-z0-9._-]*?)((?:[<>=!~].*)?)", line).groups()
    return name, SpecifierSet(re.sub(r"^=(?!=)(.*)$", r"==\1.*", versions))


def conda_lines(): return [line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)]


def test_keys_of_the_environment():
    assert set(ENVIRONMENT) == {"name", "channels", "dependencies"}
    assert ENVIRONMENT["name"] == PROJECT["name"] and ENVIRONMENT["channels"] == ["conda-forge"]
    assert [set(line) for line in ENVIRONMENT["dependencies"] if not isinstance(line, str)] == [{"pip"}]


def test_conda_brings_python_and_pip_and_nothing_else():
    """Anything else would be a second set of versions beside constraints.txt."""
    assert sorted(conda_spec(line)[0] for line in conda_lines()) == ["pip", "python"]


def test_pip_section_installs_this_project_with_its_pins():
    section = next(line["pip"] for line in ENVIRONMENT["dependencies"] if not isinstance(line, str))
    assert len(section) == len(set(section))
    assert set(section) == {"--constraint constraints.txt", "--editable .[dev]"}
    assert "dev" in PROJECT["optional-dependencies"]


def test_conda_python_is_one_the_project_supports():
    wanted = dict(map(conda_spec, conda_lines()))["python"]
    admitted = [f"3.{minor}" for minor in range(30) if f"3.{minor}" in wanted or f"3.{minor}.1" in wanted]
    assert admitted and set(admitted) <= set(pythons()), f"conda admits {admitted}, the project {pythons()}"


@pytest.mark.parametrize("line", ["python = =3.11", "python=>3.11", "python>=3.10<3.14", "python 3.11", "Python=3.11", "python=", "pip>=24,", "pip>=24, <26", "-c x"])
def test_bad_match_specs_are_refused(line):
    with pytest.raises(ValueError, match="not a match spec"): conda_spec(line)


@pytest.mark.parametrize("line, inside, outside", [
    ("python=3.11", "3.11.9", "3.12.0"), ("python>=3.10,<3.14", "3.13.2", "3.14.0"), ("pip>=24", "26.1", "23.3"), ("x==1.2.3", "1.2.3", "1.2.4")])
def test_good_match_specs_are_read(line, inside, outside):
    _, versions = conda_spec(line)
    assert inside in versions and outside not in versions


@pytest.mark.parametrize("line", CONSTRAINTS)
def test_a_pin_is_one_release(line):
    requirement = Requirement(line)
    (specifier,) = requirement.specifier
    assert specifier.operator == "==" and Version(specifier.version).local is None and "*" not in specifier.version
    assert not requirement.extras and requirement.url is None


@pytest.mark.parametrize("python", pythons())
def test_everything_required_is_pinned_once(python):
    """For every supported Python: each direct requirement has exactly one pin, inside the range that pyproject.toml gives."""
    required, pinned = requirements("dev") | requirements(), pins(python)
    assert set(pinned) == set(required) | BESIDES
    for name, versions in pinned.items():
        assert len(versions) == 1, f"{name} is pinned {len(versions)} times for Python {python}"
        if name in required: assert Version(versions[0].removeprefix("==")) in required[name].specifier, f"{name}{versions[0]} is outside {required[name]}"


def test_torch_is_the_one_decided():
    assert pins("3.11")["torch"] == ["==2.13.0"]


def third_party(rooms, top_only):
    """Distribution -> the rooms that import it."""
    found, imports = {}, all_imports()
    for room in rooms:
        for imported in imports[room]:
            package = imported.name.split(".")[0]
            if package in sys.stdlib_module_names or package == "musicssl" or (top_only and not imported.at_top): continue
            found.setdefault(canonicalize_name(DISTRIBUTION.get(package, package)), set()).add(room)
    return found


def test_dependencies_are_what_the_library_imports():
    """Core dependencies = what rooms import at their top, reading rooms aside, and what two rooms import when it is needed."""
    needed = third_party(set(all_imports()) - READING_ROOMS, top_only=True)
    for name, room in LATE.items():
        needed[name] = third_party([room], top_only=False).get(name)
        assert needed[name], f"musicssl.{room} no longer imports {name}"
    surplus, absent = set(requirements()) - set(needed), {name: rooms for name, rooms in needed.items() if name not in requirements()}
    assert not absent, f"imported at the top, but not a dependency: {absent}"
    assert not surplus, f"a dependency that no room imports at its top: {sorted(surplus)}"


def test_reading_rooms_need_the_extra_nb_only():
    needed = third_party(READING_ROOMS & set(all_imports()), top_only=True)
    absent = {name: rooms for name, rooms in needed.items() if name not in requirements("nb") | requirements() | dict.fromkeys(BESIDES)}
    assert not absent, f"imported by a reading room, but in neither the dependencies nor `nb`: {absent}"


def test_late_imports_can_be_installed_too():
    needed = third_party(all_imports(), top_only=False)
    absent = {name: rooms for name, rooms in needed.items() if name not in requirements("dev") | requirements() | dict.fromkeys(BESIDES)}
    assert not absent, f"imported inside functions, but in no extra: {absent}"


def test_extras_do_not_repeat_the_dependencies():
    repeated = {extra: sorted(set(requirements(extra)) & set(requirements())) for extra in PROJECT["optional-dependencies"]}
    assert not any(repeated.values()), repeated


def test_tests_use_installed_packages_only():
    tests = [imported.name.split(".")[0] for path in sorted((ROOT / "tests").rglob("*.py")) for imported in imports_of("tests", path, set())]
    local = {path.stem for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")} | {"musicssl", "tomli", "tests"}
    absent = {name for name in tests if name not in sys.stdlib_module_names and name not in local
              and canonicalize_name(DISTRIBUTION.get(name, name)) not in requirements("dev") | requirements() | dict.fromkeys(BESIDES)}
    assert not absent, f"imported by a test, but in no extra: {sorted(absent)}"


def test_citation_is_of_this_version_and_names_the_five_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf8"))
    assert citation["version"] == musicssl.__version__ and citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    cited = {paper["identifiers"][0]["value"] for paper in citation["references"]}
    assert cited == {"arXiv:2103.09410", "arXiv:2008.00781", "arXiv:2112.04214", "arXiv:2102.03229", "arXiv:2306.00107"}
    for paper in citation["references"]:
        assert paper["url"].endswith(paper["identifiers"][0]["value"].removeprefix("arXiv:")) and all(author["family-names"] for author in paper["authors"])
