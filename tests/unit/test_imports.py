"""The rules of the house that a syntax tree shows: who may import whom, who may talk to ranks, who may print."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# where each import package lies, and what this project calls a package
PACKAGES = {
    "lowbit_kernels": ROOT / "kernels" / "lowbit_kernels",
    "megatron_lowbit": ROOT / "megatron_lowbit",
    "checkpoints_conv": ROOT / "checkpoints_conv",
    "lowbit_tools": ROOT / "tools" / "lowbit_tools",
}
# From the bottom up; a module may import its own layer and those below. Everything of megatron_lowbit that is not
# named here (weights, generate, evaluate, tokenizer, ...) makes the layer above its models.
LAYERS = [
    (
        "megatron_lowbit.config",
        "megatron_lowbit.files",
        "megatron_lowbit.sharding",
        "megatron_lowbit.stored",
        "megatron_lowbit.transport",
    ),
    ("megatron_lowbit.parallel",),
    ("lowbit_kernels",),
    ("megatron_lowbit.comm",),
    ("megatron_lowbit.calibration",),
    ("megatron_lowbit.layers",),
    ("megatron_lowbit.models",),
    ("megatron_lowbit",),
    ("checkpoints_conv",),
    ("lowbit_tools",),
]
IMPORT_NOTHING_OF_OURS = (
    "lowbit_kernels",
    "megatron_lowbit.config",
    "megatron_lowbit.files",
    "megatron_lowbit.sharding",
    "megatron_lowbit.stored",
    "megatron_lowbit.transport",
)
MAY_CALL_DISTRIBUTED = (
    "megatron_lowbit.parallel",
    "megatron_lowbit.transport.process_group",
    "megatron_lowbit.transport.symmetric_memory",
    "lowbit_tools.all_reduce_bench",
)
# starts processes and waits for them; it sends nothing
MAY_LAUNCH_RANKS = ("lowbit_tools.local_ranks",)
READ_ON_ANY_LAPTOP = tuple(
    f"megatron_lowbit.comm.{name}" for name in ("wire_format", "schemes", "reference", "constants")
)
MAX_LINES = 300


@cache
def sources() -> dict[str, Path]:
    """Every module of ours by its import name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(), str(sources()[module]))


def within(module: str, prefixes: Iterable[str]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def type_checking_nodes(module: str) -> set[ast.AST]:
    """Nodes under `if TYPE_CHECKING:`, which never run."""
    hidden: set[ast.AST] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            hidden |= {child for statement in node.body for child in ast.walk(statement)}
    return hidden


@cache
def imported(module: str) -> frozenset[str]:
    """Dotted names a module imports anywhere in its text, functions included; `from a import b` counts as `a.b`."""
    package = module if sources()[module].name == "__init__.py" else module.rpartition(".")[0]
    hidden, names = type_checking_nodes(module), set()
    for node in ast.walk(tree(module)):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(names)


@cache
def ours(module: str) -> frozenset[str]:
    """Modules of ours that a module imports, packages whose `__init__` runs on the way included."""
    found = set()
    for name in imported(module):
        parts = name.split(".")
        if parts[0] not in PACKAGES:
            continue
        prefixes = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
        found |= {prefix for prefix in prefixes if prefix in sources()}
    return frozenset(found - {module})


def reachable(module: str) -> set[str]:
    seen, waiting = {module}, [module]
    while waiting:
        for other in ours(waiting.pop()) - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def layer(module: str) -> int:
    """The layer with the longest prefix of the name."""
    best = max(
        (
            (len(prefix), level)
            for level, prefixes in enumerate(LAYERS)
            for prefix in prefixes
            if within(module, [prefix])
        ),
        default=None,
    )
    assert best is not None, f"{module} has no layer"
    return best[1]


def mentions(module: str, dotted: str) -> Iterator[int]:
    """Lines where `dotted` (`torch.distributed`) or something below it is imported or written out."""
    if dotted.rpartition(".")[2] not in sources()[module].read_text():
        return
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            named = [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
        if any(within(name, [dotted]) for name in named):
            yield node.lineno


def where(module: str, line: int) -> str:
    return f"{sources()[module].relative_to(ROOT)}:{line}"


def is_bare_package(module: str) -> bool:
    """The `__init__` of a package that imports nothing: importing it on the way to a submodule crosses no layer."""
    return sources()[module].name == "__init__.py" and not ours(module)


def test_the_walk_sees_the_packages():
    for package in PACKAGES:
        assert package in sources(), f"{package} not found"
    assert len(sources()) > 60
    assert "megatron_lowbit.parallel" in ours("megatron_lowbit.comm.two_stage")
    assert "lowbit_kernels.reference" in ours("megatron_lowbit.comm.reference")
    assert "megatron_lowbit.layers.linear" in reachable("megatron_lowbit.weights")
    assert [*mentions("megatron_lowbit.parallel", "torch.distributed")]


def test_imports_point_downwards():
    wrong = [
        f"{module} imports {other}"
        for module in sources()
        for other in ours(module)
        if layer(other) > layer(module) and not is_bare_package(other)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("prefix", IMPORT_NOTHING_OF_OURS)
def test_the_ground_imports_nothing_of_ours(prefix):
    for module in sources():
        if within(module, [prefix]):
            foreign = {other for other in ours(module) if not within(other, [prefix]) and not is_bare_package(other)}
            assert not foreign, f"{module} imports {foreign}"


@pytest.mark.parametrize("module", READ_ON_ANY_LAPTOP)
def test_the_method_reads_without_ranks_and_triton(module):
    """Neither by itself nor through what it imports."""
    for other in reachable(module):
        if sources()[other].name == "__init__.py" and other == "lowbit_kernels":
            # its backends module names triton in a table and imports it only when asked for a backend
            assert not [*mentions("lowbit_kernels.backends", "triton")]
        for forbidden in ("torch.distributed", "triton"):
            lines = [where(other, line) for line in mentions(other, forbidden)]
            assert not lines, f"{module} reaches {forbidden} at {lines}"


def test_the_reference_needs_the_kernels_reference_only():
    below = {other for other in ours("megatron_lowbit.comm.reference") if within(other, ["lowbit_kernels"])}
    described = ("reference", "mixed", "rotation")
    assert below == {"lowbit_kernels", *(f"lowbit_kernels.{module}" for module in described)}


def test_no_import_cycles():
    """Depth first; what is on the path when it is met again closes a cycle."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(ours(module)):
                # a module inside a package needs the package's __init__, which may import the module: python allows it
                if not module.startswith(other + "."):
                    visit(other, (*path, module))
            done.add(module)

    for module in sources():
        visit(module, ())


def test_only_one_module_talks_to_ranks():
    for module in sources():
        if within(module, MAY_CALL_DISTRIBUTED):
            continue
        for line in mentions(module, "torch.distributed"):
            names = {name for name in imported(module) if within(name, ["torch.distributed"])}
            launching = within(module, MAY_LAUNCH_RANKS) and all(
                within(name, ["torch.distributed.elastic", "torch.distributed.launcher"]) for name in names
            )
            assert launching, f"{where(module, line)} uses torch.distributed; go through ParallelContext"


def test_only_tools_parse_arguments_or_print():
    for module in sources():
        if within(module, ["lowbit_tools"]):
            continue
        for name in imported(module):
            assert not within(name, ["argparse", "rich", "click", "sys.argv"]), f"{module} imports {name}"
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "input"), where(module, node.lineno)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys":
                assert node.attr not in ("argv", "stdout", "stderr", "exit"), where(module, node.lineno)


def test_no_global_statements_and_no_blanket_excepts():
    for module in sources():
        for node in ast.walk(tree(module)):
            assert not isinstance(node, ast.Global), f"{where(module, node.lineno)}: a global"
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                blanket = not caught or {"Exception", "BaseException"} & set(
                    caught.strip("()").replace(" ", "").split(",")
                )
                assert not blanket, f"{where(module, node.lineno)}: except {caught}"


def test_no_sys_path_and_no_environment_switches():
    """Where modules are found is settled by the installation; numerics by arguments, never by the environment."""
    # the backend asks whether Triton runs interpreted: it decides where kernels can run, not what they compute
    may_read_environment = ("megatron_lowbit.parallel", "lowbit_tools", "lowbit_kernels.triton_backend")
    for module in sources():
        assert not [*mentions(module, "sys.path")], f"{module} changes sys.path"
        if not within(module, may_read_environment):
            lines = [where(module, line) for line in (*mentions(module, "os.environ"), *mentions(module, "os.getenv"))]
            assert not lines, lines


def test_no_file_is_longer_than_a_file_should_be():
    long = {
        str(path.relative_to(ROOT)): count
        for path in sources().values()
        if (count := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long, long


def test_every_module_says_what_it_is_for():
    for module in sources():
        assert ast.get_docstring(tree(module)), f"{where(module, 1)} has no docstring"


def test_importing_the_method_loads_neither_ranks_nor_triton():
    """The same as the walk, as Python does it: in a process of its own, since this one has imported much already."""
    # torch itself imports torch.distributed, so only what is above it can be checked
    code = (
        "import sys\n"
        "import megatron_lowbit.comm.reference, megatron_lowbit.comm.schemes\n"
        "print(*(name for name in sys.modules if name.startswith(('megatron_lowbit', 'triton', 'transformers'))))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "megatron_lowbit.comm.reference" in loaded
    assert not {name for name in loaded if name.startswith(("triton", "transformers"))}
    assert "megatron_lowbit.parallel" not in loaded
