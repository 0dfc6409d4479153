"""Which room of the source may import which, and the sizes that keep a file readable. Imports are read, not run."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"sigswap": "sigswap", "sigswap.passes": "passes", "sigswap.kernels": "kernels"}

LEAVES = (
    *("errors", "masked", "version", "optional", "config", "report", "page", "transaction", "files"),
    "when_imported",
)
ROOMS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "masked": (),
    "version": (),
    "optional": ("errors",),
    "config": ("errors",),
    "files": (),
    "page": (),
    "report": ("errors", "files", "page"),
    "transaction": ("errors",),
    "when_imported": (),
    "kernels": ("errors", "masked"),
    "passes": ("errors", "masked"),
    "sequence": ("kernels", *LEAVES),
    "functional": ("sequence", "kernels", *LEAVES),
    "conversion": ("functional", "sequence", "passes", *LEAVES),
    "compiling": ("conversion", "functional", "passes", "kernels", *LEAVES),
    "distributed": ("conversion", "functional", "sequence", *LEAVES),
    "training": ("distributed", "conversion", "functional", "kernels", *LEAVES),
    "saving": ("distributed", "conversion", *LEAVES),
    "api": ("training", "saving", "distributed", "conversion", *LEAVES),
    "bench": ("api", "distributed", "saving", "compiling", "conversion", "functional", "sequence", *LEAVES),
    "former_names": (),
    "the package": (
        "former_names",
        "api",
        "distributed",
        "saving",
        "training",
        "compiling",
        "conversion",
        "functional",
        "kernels",
        *LEAVES,
    ),
    "commands": ("the package", "bench", "api", "saving", "training", "compiling", "conversion", *LEAVES),
}
"""By room, from the bottom, the rooms that its files may import besides their own, at the top of a file or in a
function. ``api`` is sigswap/api.py and ``the package`` is sigswap/__init__.py; what is not here may not be imported.
``former_names`` imports by name, for old pickles, and is called when all else is there."""

NEVER = [("kernels.triton", "kernels.reference"), ("kernels.hopper", "kernels.reference")]
"""Within a room: an optimised kernel does not know the reference that it is compared with."""

MOST_LINES, MOST_PARAMETERS = 600, 30

LONG, MOST_REPEATED = 5, 5
"""Of functions with LONG or more parameters, so many may have those of another one."""


class Import(NamedTuple):
    """``module`` imports ``target``; ``at_import``: when it is imported itself, and not in a function of it."""

    module: str
    target: str
    line: int
    at_import: bool


def sources(root: Path) -> dict[str, Path]:
    """The files of the source by the module that each is."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(module: str, path: Path, known: Mapping[str, Path]) -> Iterator[Import]:
    """Those of the source's own modules."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, at_import)
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            at_import = False
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: an import says the whole name"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in inner]
        for name in dict.fromkeys(names):
            if name in known and name != module:
                yield Import(module, name, node.lineno, at_import)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import)

    return visit(ast.parse(path.read_text()), True)


def all_imports(root: Path) -> list[Import]:
    known = sources(root)
    return [found for module, path in known.items() for found in imports(module, path, known)]


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "the package"


def is_in(module: str, part: str) -> bool:
    return f"{module}.".startswith(f"sigswap.{part}.")


def arrows_up(root: Path) -> list[str]:
    """The imports that the table does not allow."""
    return [
        f"{found.module}:{found.line} imports {found.target}"
        for found in all_imports(root)
        if (room(found.target) != room(found.module) and room(found.target) not in ROOMS[room(found.module)])
        or any(is_in(found.module, part) and is_in(found.target, other) for part, other in NEVER)
    ]


def circle(root: Path) -> list[str]:
    """Files that import one another when they are imported, if there are any."""
    graph: dict[str, set[str]] = {}
    for found in all_imports(root):
        if found.at_import:
            graph.setdefault(found.module, set()).add(found.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def functions(root: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, tuple[str, ...]]]:
    """Each function of the source: where it is, what it is, and its parameters, without self and cls."""
    for path in sources(root).values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                names = tuple(each.arg for each in arguments if each.arg not in ("self", "cls"))
                yield f"{path.relative_to(root)}:{node.lineno} {node.name}", node, names


def long_files(root: Path) -> list[str]:
    lengths = {path.relative_to(root): len(path.read_text().splitlines()) for path in sources(root).values()}
    return [f"{path}: {length} lines" for path, length in lengths.items() if length > MOST_LINES]


def long_signatures(root: Path) -> list[str]:
    """A kernel's parameters are its launch's arguments, so what Triton or Gluon compiles may have more."""
    return [
        f"{where}: {len(names)} parameters"
        for where, node, names in functions(root)
        if len(names) > MOST_PARAMETERS and not any("jit" in ast.unparse(each) for each in node.decorator_list)
    ]


def repeated_signatures(root: Path) -> list[str]:
    """The functions whose parameters are, name by name, those of an earlier one."""
    first: dict[tuple[str, ...], str] = {}
    return [
        f"{where}: as {first[names]}"
        for where, _, names in functions(root)
        if len(names) >= LONG and first.setdefault(names, where) != where
    ]


def test_the_table_has_a_bottom() -> None:
    order = list(ROOMS)
    for name, allowed in ROOMS.items():
        assert all(order.index(other) < order.index(name) for other in allowed), name
    assert {room(module) for module in sources(ROOT)} == set(ROOMS)


def test_rooms_import_only_what_is_below_them() -> None:
    assert arrows_up(ROOT) == []


def kernels_that_import_one_another(root: Path) -> list[str]:
    """Of those that dispatch chooses from."""
    assigned = [
        node for node in ast.parse((root / "kernels/dispatch.py").read_text()).body if isinstance(node, ast.Assign)
    ]
    lists = [node.value for node in assigned if ast.unparse(node.targets[0]) in ("FORWARD", "BACKWARD")]
    kernels = {f"sigswap.kernels.{name}" for each in lists for name in ast.literal_eval(each)}
    return [
        f"{found.module} imports {found.target}"
        for found in all_imports(root)
        if {found.module, found.target} <= kernels
    ]


def test_kernels_stand_side_by_side() -> None:
    assert kernels_that_import_one_another(ROOT) == []


def test_no_two_files_import_one_another() -> None:
    assert circle(ROOT) == []


def test_a_file_fits_in_one_reading() -> None:
    assert long_files(ROOT) == []


def test_a_function_has_no_more_parameters_than_multi_head_attention_needs() -> None:
    assert long_signatures(ROOT) == []


def test_parameter_lists_are_not_repeated() -> None:
    repeated = repeated_signatures(ROOT)
    assert len(repeated) <= MOST_REPEATED, "\n".join(repeated)


def test_the_design_page_has_the_rooms() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(?:sigswap/)?(\w+)(?:/|\.py)` \|.*\| (.*?) ?\|$", page, re.MULTILINE)
    rooms = {room: set(may) - set(LEAVES) for room, may in ROOMS.items() if room not in LEAVES}
    del rooms["the package"], rooms["former_names"]
    assert {room: set(filter(None, may.split(", "))) for room, may in shown} == rooms


LINES = ["x = 1"] * (MOST_LINES + 1)
MANY = ", ".join(f"x{i}" for i in range(MOST_PARAMETERS + 1))


@pytest.mark.parametrize(
    ("files", "check", "broken"),
    [
        ({"kernels/op.py": "def f():\n    from sigswap.conversion import mode"}, arrows_up, "kernels.op:2 imports"),
        ({"passes/find.py": "import sigswap.conversion.mode"}, arrows_up, "passes.find:1 imports"),
        ({"sigswap/report.py": "from sigswap import __version__"}, arrows_up, "report:1 imports sigswap"),
        ({"kernels/triton/a.py": "from sigswap.kernels import reference"}, arrows_up, "triton.a:1 imports"),
        ({"kernels/triton/b.py": "import sigswap.kernels.triton.a"}, kernels_that_import_one_another, "b imports"),
        ({"passes/a.py": "if TYPE_CHECKING:\n    from sigswap.kernels import op"}, arrows_up, "passes.a:2 imports"),
        ({"passes/a.py": "from sigswap.passes import b", "passes/b.py": "import sigswap.passes.a"}, circle, "passes.b"),
        ({"passes/a.py": "\n".join(LINES)}, long_files, "passes/a.py: 601 lines"),
        ({"passes/a.py": f"@cache\ndef f({MANY}): ..."}, long_signatures, "f: 31 parameters"),
        ({"passes/a.py": "def f(a, b, c, d, *, e): ...\ndef g(self, a, b, c, d, e): ..."}, repeated_signatures, "2 g"),
    ],
)
def test_a_break_of_each_rule_is_seen(
    files: dict[str, str], check: Callable[[Path], list[str]], broken: str, tmp_path: Path
) -> None:
    kept = {
        "kernels/reference.py": "",
        "kernels/dispatch.py": "FORWARD = ('triton.a', 'triton.b')",
        "kernels/triton/a.py": "",
        "kernels/op.py": "",
        "sigswap/__init__.py": "from sigswap.conversion.mode import x",
        "sigswap/conversion/mode.py": "def f():\n    from sigswap.passes import c",
        "passes/c.py": f"@triton.jit(debug=True)\ndef f({MANY}): ...\ndef g(a, b, c, d): ...\ndef h(a, b, c, d): ...",
    }
    for name, text in kept.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert check(tmp_path) == []
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert broken in "\n".join(check(tmp_path))
