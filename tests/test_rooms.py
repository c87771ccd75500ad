"""Imports go one way, those inside functions too: the order of the package's rooms, and no circle of modules."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import heterotune_flwr

PACKAGE = "heterotune_flwr"
ROOT = Path(heterotune_flwr.__file__).parent

#: Lowest floor first. A room imports from its own and lower floors; from another room of its floor on the first alone.
FLOORS = (
    "names jsons errors plugins flower programs program_version rates seeds fields schema quiet cli_help",
    "config",
    "exchange",
    "backbones",
    "data",
    "dema cmga",
    "alignment",
    "protocol",
    "tuning",
    "channels",
    "client federation",
    "strategies",
    "reporting",
    "report",
    "track",
    "export",
    "own_data",
    "preflight experiment",
    "runs completion",
    "worker deploy",
    "new",
    "data_check doctor forecast",
    "anchor_files",
    "settings",
    "settings_page",
    "cli_backbones cli_config cli_data cli_doctor cli_export cli_new cli_report cli_run cli_talk cli_track",
    "cli",
    "entry",
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms.split()}
#: PEFT wants a tuner's configuration and model registered together; whoever makes the one registers both.
TUNER = {"dema.config", "dema.layer", "dema.model", "dema.registration"}


def modules() -> dict[str, Path]:
    """Every module by its name below the package; a room's front page by the room's."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """What of the package a module imports: (module, line, whether for type checking alone)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.partition(".")[0] == PACKAGE:
                below = name.partition(".")[2]
                module = below if below in MODULES else below.rpartition(".")[0]
                yield module, node.lineno, id(node) in typing_only


def test_every_room_has_a_floor() -> None:
    assert {name.partition(".")[0] for name in MODULES} - {""} == set(FLOOR_OF)


def test_no_room_imports_from_a_higher_floor() -> None:
    upwards = []
    for name, path in MODULES.items():
        room = name.partition(".")[0]
        for module, line, _ in imports(path):
            other = module.partition(".")[0]
            if not room or not other or room == other:
                continue
            mine, its = FLOOR_OF[room], FLOOR_OF[other]
            if its > mine or its == mine > 0:
                upwards.append(f"{name}:{line} imports {module}")
    assert not upwards, "\n".join(upwards)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Of type-checking imports none counts: functions that do a part of a class' work name its type."""
    sorter: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for name, path in MODULES.items():
        for module, _, typing_only in imports(path):
            if not typing_only and not {name, module} <= TUNER:
                sorter.add(name, module)
    sorter.prepare()  # a CycleError names the circle


def test_a_server_imports_neither_torch_nor_what_trains() -> None:
    """Server halves and records of channels, and all that a server imports, do without."""
    starts = ["experiment", "cmga", "protocol.messages"]
    starts += [name for name in MODULES if name.startswith("channels.") and name.endswith("server")]
    starts += [name for name in MODULES if name.startswith("channels.") and name.endswith("record")]
    seen: set[str] = set()
    while starts:
        name = starts.pop()
        if name in seen:
            continue
        seen.add(name)
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        for node in tree.body:  # what is imported with the module, not inside functions
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for one in names:
                top, _, below = one.partition(".")
                assert top not in ("torch", "peft", "transformers"), f"{name} imports {one}"
                if top == PACKAGE:
                    module = below if below in MODULES else below.rpartition(".")[0]
                    starts += [module, module.partition(".")[0]]
    trains = {name for name in seen if name.startswith(("tuning.", "client."))}
    assert not trains, trains


def test_nobody_imports_the_tuner_but_by_its_room() -> None:
    """Its front page registers the tuner with PEFT; whoever imported it past that would leave PEFT without."""
    past = [
        f"{name} imports {module}"
        for name, path in MODULES.items()
        for module, _, typing_only in imports(path)
        if module in TUNER and not typing_only and not name.startswith("dema")
    ]
    assert not past, past
    inside = {name for name in MODULES if name.startswith("dema.")} - TUNER
    entered = {"dema.access", "dema.head", "dema.label_logits"}  # of a model that has the tuner
    reached = {
        name
        for name in inside
        for module, _, typing_only in imports(MODULES[name])
        if module in TUNER and not typing_only
    }
    assert reached <= entered | {"dema.when_peft"}
