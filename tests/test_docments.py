"""Everything public says what it is: a docstring, and a comment for every parameter and for what is returned."""
import dataclasses
import importlib
import inspect
from types import NoneType
from typing import NoReturn

import pytest
from fastcore.docments import docments

from imports_of import rooms


def undocumented(thing, documented, owner, wants_return):
    """What is missing from one signature. fastcore cannot read the comments of `*args` and `**kwargs`."""
    stars = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    exempt = {"self", "cls", "return", *(name for name, p in inspect.signature(thing).parameters.items() if p.kind in stars)}
    missing = [f"{owner}: parameter {name}" for name, entry in documented.items() if name not in exempt and not entry["docment"]]
    answer = documented.get("return")
    promised = answer and answer["anno"] not in (None, NoneType, "None", NoReturn)
    return missing + ([f"{owner}: what it returns"] if wants_return and promised and not answer["docment"] else [])


def missing_of(name, thing):
    """What is missing from a function or a class: docstring, parameters, return."""
    inherited = inspect.isclass(thing) and any(thing.__doc__ == base.__doc__ for base in thing.__mro__[1:])
    generated = dataclasses.is_dataclass(thing) and (thing.__doc__ or "").startswith(f"{thing.__name__}(")
    missing = [f"{name}: docstring"] if not (thing.__doc__ or "").strip() or inherited or generated else []
    if inspect.isfunction(inspect.unwrap(thing)): return missing + undocumented(thing, docments(thing, full=True), name, True)
    if "__init__" in vars(thing) and not getattr(thing, "_is_protocol", False):
        target = thing if dataclasses.is_dataclass(thing) else thing.__init__
        return missing + undocumented(thing, docments(target, full=True), name, False)
    return missing


def missing_in(room):
    """What is missing from a room."""
    module = importlib.import_module(f"musicssl.{room}")
    public = {name: getattr(module, name) for name in module.__all__}
    ours = {name: thing for name, thing in public.items() if getattr(thing, "__module__", None) == module.__name__}
    return [line for name, thing in ours.items() if inspect.isclass(thing) or inspect.isfunction(inspect.unwrap(thing))
            for line in missing_of(f"{room}.{name}", thing)]


def test_everything_public_is_documented():
    missing = [line for room in rooms() for line in missing_in(room)]
    assert not missing, f"{len(missing)} things are not documented:\n" + "\n".join(missing)


def bare(wave, # (B, T)
         seed):
    return wave


def unanswered(
    wave: int, # (B, T)
) -> int:
    """Says nothing of its answer."""


def complete(
    wave: int, # (B, T)
) -> int: # (B,)
    """Says it all."""


class Bare:
    """Keeps a secret."""
    def __init__(self, secret: int): self.secret = secret


@dataclasses.dataclass
class Fields:
    """Half told."""
    told: int # a number
    untold: int


@dataclasses.dataclass
class Generated:
    told: int # a number


@pytest.mark.parametrize("thing, missing", [
    (bare, ["x: docstring", "x: parameter seed", "x: what it returns"]),
    (unanswered, ["x: what it returns"]),
    (complete, []),
    (Bare, ["x: parameter secret"]),
    (Fields, ["x: parameter untold"]),
    (Generated, ["x: docstring"]),
])
def test_the_rule_sees_what_is_missing(thing, missing):
    assert missing_of("x", thing) == missing
