"""The rooms and who may enter whom. A forbidden import fails here, with the line that made it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import halfbyte

SOURCE = Path(halfbyte.__file__).parent

# room: the rooms it may import from. Read top to bottom: nothing imports downwards.
MAY_IMPORT = {
    "errors": set(),
    "scheme": {"errors"},
    "machine": {"errors"},
    "demo_text": {"errors"},
    "numerics": {"errors", "scheme"},
    "solvers": {"errors", "numerics"},
    "packing": {"errors"},
    "kernels": {"errors", "packing"},
    "models": {"errors"},
    "calibration": {"errors", "scheme", "numerics", "models"},
    "methods": {"errors", "scheme", "numerics", "solvers", "models", "calibration"},
    "recipe": {"errors", "scheme", "methods"},
    "layouts": {"errors", "scheme", "numerics", "packing", "models"},
    "plan": {"errors", "scheme", "numerics", "models", "calibration", "recipe", "layouts"},
    "runtime": {
        "errors", "machine", "scheme", "numerics", "packing", "kernels", "models", "calibration", "recipe", "layouts",
        "plan",
    },
    "record": {"scheme"},
    "block": {"errors", "scheme", "numerics", "models", "calibration", "methods", "recipe", "record"},
    "evaluation": {"errors", "scheme", "calibration", "models", "layouts", "runtime", "record", "plan", "recipe"},
    "checkpoint": {
        "errors", "scheme", "numerics", "models", "calibration", "recipe", "layouts", "plan", "record", "evaluation",
        "__init__",
    },
    "run": {"errors", "machine", "numerics", "models", "calibration", "recipe", "layouts", "runtime", "plan", "record"},
    "pipeline": {
        "errors", "machine", "models", "recipe", "layouts", "block", "record", "plan", "run", "checkpoint",
        "evaluation",
    },
    "demonstration": {"errors", "demo_text", "machine", "models", "recipe", "layouts", "pipeline", "evaluation", "runtime"},
    "huggingface": {"errors", "scheme", "models", "layouts", "runtime"},
    "cli": {
        "errors", "recipe", "plan", "block", "run", "pipeline", "layouts", "evaluation", "runtime", "demonstration", "machine",
        "scheme", "__init__",
    },
    "__init__": {"demonstration", "evaluation", "layouts", "pipeline", "recipe", "runtime"},
}  # fmt: skip

# Heavy third parties have one door each; everything else goes through it.
DOORS = {
    "transformers": {
        "models/load.py", "runtime/load.py", "runtime/generate.py", "huggingface.py", "calibration/self_written.py",
        "models/linearize.py", "cli/terminal.py", "runtime/cache.py", "runtime/cache_attention.py", "calibration/cache.py",
        "calibration/past_only.py",
        "runtime/static_cache.py", "runtime/even_cache.py", "runtime/cache_decode.py",
    },
    "triton": {"kernels", "solvers"},
    "datasets": {"calibration/data.py"},
    "typer": {"cli"},
    "rich": {"cli", "demonstration.py"},
}  # fmt: skip


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, with the line; imports for type checkers only are none."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(node)
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and "TYPE_CHECKING" in ast.dump(guard.test)
        for node in ast.walk(guard)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        match node:
            case ast.Import(names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module, names, level):
                assert level == 0, f"{path}:{node.lineno}: write imports from `halfbyte.` down"
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in names)


def test_rooms_import_only_what_they_may():
    wrong = []
    for path in SOURCE.rglob("*.py"):
        here = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for line, module in imported(path):
            package, *room = module.split(".")
            if package != "halfbyte":
                continue
            there = room[0] if (SOURCE / room[0]).is_dir() or (SOURCE / f"{room[0]}.py").is_file() else "__init__"
            if there not in (here, *MAY_IMPORT[here]):
                wrong.append((f"{path.relative_to(SOURCE)}:{line}", there))
    assert not wrong


def test_heavy_third_parties_enter_by_their_door():
    wrong = []
    for path in SOURCE.rglob("*.py"):
        place = path.relative_to(SOURCE)
        for line, module in imported(path):
            doors = DOORS.get(module.split(".")[0])
            if doors is not None and not {str(place), place.parts[0]} & doors:
                wrong.append(f"{place}:{line} imports {module}")
    assert not wrong


def test_the_plan_itself_has_no_cycle():
    order = list(MAY_IMPORT)
    assert all(
        order.index(there) < order.index(here)
        for here, rooms in MAY_IMPORT.items()
        for there in rooms
        if there != "__init__"  # for the version's sake
    )


def test_every_room_has_its_line():
    rooms = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in SOURCE.rglob("*.py")}
    assert rooms == set(MAY_IMPORT)


def test_a_method_never_imports_a_kernel_nor_a_kernel_a_method():
    assert "kernels" not in MAY_IMPORT["methods"]
    assert "methods" not in MAY_IMPORT["kernels"]
