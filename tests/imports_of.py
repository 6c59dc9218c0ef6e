"""What the modules of the package import, read from their source without importing them."""
import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "musicssl"


@dataclass(frozen=True)
class Import:
    """One imported module: its dotted name, the line, and whether importing the room already runs it."""
    name: str
    line: int
    at_top: bool


def rooms(package: Path = PACKAGE) -> dict[str, Path]:
    """Name within the package -> file, without `__init__` and nbdev's index."""
    files = {".".join(path.relative_to(package).with_suffix("").parts): path for path in sorted(package.rglob("*.py"))}
    return {name: path for name, path in files.items() if name.split(".")[-1] not in ("__init__", "_modidx")}


def _is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _names(node: ast.AST, room: str, known: set[str]) -> list[str]:
    if isinstance(node, ast.Import): return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = ("musicssl." + room).split(".")[:-node.level] if node.level else []
        source = ".".join([*above, *([node.module] if node.module else [])])
        inner = [f"{source}.{alias.name}" for alias in node.names]
        return [name if name.removeprefix("musicssl.") in known else source for name in inner]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        return [node.args[0].value] if node.args and isinstance(node.args[0], ast.Constant) else []
    return []


def imports_of(room: str, path: Path, known: set[str]) -> list[Import]:
    """Every import of a room, relative ones made absolute, at the top of the module or inside functions."""
    found = []
    def visit(node: ast.AST, at_top: bool) -> None:
        found.extend(Import(name, node.lineno, at_top) for name in _names(node, room, known))
        at_top = at_top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not _is_typing_only(node)
        for child in ast.iter_child_nodes(node): visit(child, at_top)
    visit(ast.parse(path.read_text(encoding="utf8")), True)
    return list(dict.fromkeys(found))


def all_imports(package: Path = PACKAGE) -> dict[str, list[Import]]:
    """Room -> its imports."""
    known = rooms(package)
    return {room: imports_of(room, path, set(known)) for room, path in known.items()}
