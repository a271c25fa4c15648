"""The structure: imports between wings go one way; one place knows each other package."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import gpt2c

PACKAGE = Path(gpt2c.__file__).parent
# Each wing, or public module, may import those of its own line and of the lines before it,
FLOORS = (
    {"files", "kernels", "screen", "plain"},
    {"text", "model", "ops", "parallel"},
    {"formats"},
    {"generate"},
    {"causal_lm"},
    {"gpt2", "llama"},
    {"pretrained"},
    {"generator"},
    {"chat"},
    {"evaluate"},
    {"train", "scoring", "lm_eval"},
    {"bench", "finetune"},
    {"cli"},
    {"__init__", "__main__"},
)
# except these.
APART = {"model": {"files", "screen", "text"}, "text": {"model"}, "kernels": {"files", "screen"}}
APART |= {"files": {"kernels", "screen"}, "screen": {"kernels"}, "plain": {"files", "kernels"}}
APART |= {"parallel": {"text", "model", "screen"}}
OTHERS = {"numpy", "cffi", "tiktoken", "rustbpe", "safetensors", "tqdm"}
PEERS = {"torch", "transformers", "onnx", "onnxruntime", "ctranslate2", "llama_cpp", "openvino"}
KNOWN = {  # packages that few files may import: of an extra, or of a benchmark's rows
    "matplotlib": {"screen/picture.py", "train/plot.py"},
    "tensorboardX": {"train/tensorboard.py"},
    "gguf": {"formats/gguf.py"},
    "huggingface_hub": {"files/hub_client.py"},
    "lm_eval": {"evaluate/lm_eval.py"},
    "mpi4py": {"parallel/world.py"},
    "sklearn": {"evaluate/text_baselines.py"},
    **{name: {"bench/peers.py", "bench/engines.py", "bench/worker.py"} for name in PEERS},
}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def wing(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Return the wings and doors, and the other top-level packages, that a file imports."""
    own, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for package, *rest in (name.split(".") for name in names):
            if package == "gpt2c":
                own.add(rest[0] if rest else "__init__")
            else:
                others.add(package)
    return own - {wing(path)}, others


def floor(name: str) -> int:
    return next((number for number, wings in enumerate(FLOORS) if name in wings), -1)


def test_every_file_has_a_floor() -> None:
    assert {wing(path) for path in FILES} == set().union(*FLOORS)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    own, others = imports(path)
    for name in own:
        assert floor(name) >= 0, f"{path} imports {name}, which is no wing and no door"
        assert floor(name) <= floor(wing(path)), f"{path} imports {name}, which stands above it"
    assert not own & APART.get(wing(path), set())
    unknown = others - sys.stdlib_module_names - OTHERS
    assert not {name for name in unknown if str(path) not in KNOWN.get(name, ())}


def exported(path: Path) -> set[str]:
    """Return a module's `__all__`; ruff checks that each of its names exists."""
    for node in ast.parse((PACKAGE / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{path} has no __all__")


def test_modules_import_only_names_of_all() -> None:
    modules = {
        ".".join(("gpt2c", *path.with_suffix("").parts)): exported(path)
        for path in FILES
        if path.name not in ("__init__.py", "__main__.py", "ops.py")  # whose names are declared
    }
    for path in FILES:
        for node in ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                names = {alias.name for alias in node.names} - {"*"}  # which takes `__all__` alone
                others = names - modules[node.module]
                assert not others, f"{path} imports what {node.module} does not have in __all__"


def test_wings_list_their_names() -> None:
    """`__all__` of a wing has what it imports for users, or else its modules."""
    for init in (path for path in FILES if path.name == "__init__.py" and len(path.parts) == 2):
        tree = ast.parse((PACKAGE / init).read_text(encoding="utf-8"))
        froms = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        doors = {alias.name for node in froms for alias in node.names}
        below = [path.parts[1] for path in FILES if path.parts[0] == wing(init) and path != init]
        modules = {name.removesuffix(".py") for name in below}
        assert exported(init) == (doors or modules), f"{init}: see its __all__"


def test_no_two_types_share_a_name() -> None:
    """Of classes and aliases; the same alias in several files is one type.

    `Array` is an array of the floats of its file: of float32 in C's, of any size in the reference.
    """
    found: dict[str, set[str]] = {}
    for path in FILES:
        for node in ast.parse((PACKAGE / path).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).add(f"class in {path}")
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if re.fullmatch("[A-Z][A-Za-z]*[a-z][A-Za-z]*", name):
                    found.setdefault(name, set()).add(ast.unparse(node.value))
    twice = {name: kinds for name, kinds in found.items() if len(kinds) > 1}
    assert twice.keys() <= {"Array"}


def test_reference_imports_numpy_alone() -> None:
    for path in [*(PACKAGE / "kernels" / "reference").iterdir(), PACKAGE / "plain.py"]:
        if path.suffix == ".py":
            _, others = imports(path.relative_to(PACKAGE))
            assert others - sys.stdlib_module_names <= {"numpy"}


def test_limits_of_the_machine_are_read_in_one_module() -> None:
    """Code elsewhere would see other cores after OpenMP has bound a thread, and no quotas."""
    asks = r"cpu_count|sched_getaffinity|SC_(PHYS|NPROC)|sys/fs/cgroup|RLIMIT_(AS|DATA)"
    asking = {str(path) for path in FILES if re.search(asks, (PACKAGE / path).read_text())}
    assert asking == {"kernels/limits.py", "cli/info.py"}  # which shows each of them
