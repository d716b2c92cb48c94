"""The packages' arrows, and what a user gets who installs the project."""

from __future__ import annotations

import ast
import io
import os
import shutil
import subprocess
import sys
import tokenize
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# each package and those it may import from
ARROWS = {
    "kernels": set(),
    "core": {"kernels"},
    "rl": {"core", "kernels"},
    "sft": {"core", "kernels"},
    "search": {"core", "kernels"},
    "eval": {"core", "kernels"},
    "launch": {"kernels", "core", "rl", "sft", "search", "eval"},
}
SOURCES = [path for package in ARROWS for path in sorted((ROOT / package).rglob("*.py"))]
# modules that users import; one that is not written yet is passed over
INTERFACE = [
    "rl.ppo",
    "kernels.logprob",
    "core.training.packing",
    "core.text.chat",
    "core.sampling.sampler",
    "rl.rollout",
    "rl.verifier",
    "eval.score",
    "search.decontaminate",
]


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path):
    """Every module that a file imports, anywhere in it, by its full name: relative ones included."""
    package = ["verippo", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("verippo.")
            and node.value.replace(".", "").replace(":", "").replace("_", "").isalnum()
        ):
            yield node.value.partition(":")[0]  # imported by name, as launch/cli.py does


def ours(module):
    """The package of ours that a module lies in, or None. A bare `core.x` would count too."""
    parts = module.split(".")
    if parts[0] == "verippo" and len(parts) > 1:
        return parts[1]
    return parts[0] if parts[0] in ARROWS and parts[0] != "kernels" else None


@pytest.mark.parametrize("package", ARROWS)
def test_a_package_imports_only_those_it_may(package):
    for path in (path for path in SOURCES if path.relative_to(ROOT).parts[0] == package):
        for module in imports(path):
            target = ours(module)
            assert target is None or target == package or target in ARROWS[package], (
                f"{path}: imports {module}"
            )


# the sub-packages of core, and those of core that each may import from
ROOMS = {
    "training": set(),
    "planning": {"training"},
    "text": {"training"},
    "sampling": {"training", "text"},
    "llm": {"text"},
    "report": set(),
}
# modules directly under core, which every sub-package may import
SHARED = {"bounds", "files", "http_library", "messages", "number_array"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_of_core_imports_only_those_it_may(room):
    for path in (ROOT / "core" / room).rglob("*.py"):
        for module in imports(path):
            parts = module.split(".")
            if parts[:2] == ["verippo", "core"] and len(parts) > 2:
                assert parts[2] in ROOMS[room] | {room} | SHARED, f"{path}: imports {module}"


@pytest.mark.parametrize(
    ("library", "owner"),
    [("deepspeed", "core/training/engine.py"), ("torch.distributed", "core/training/dist.py")],
)
def test_a_library_that_must_stay_in_one_place_is_imported_there_alone(library, owner):
    users = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(module == library or module.startswith(f"{library}.") for module in imports(path))
    }
    assert users == {owner}


def test_every_public_module_function_and_class_has_a_docstring():
    missing = []
    for path in SOURCES:
        tree = parsed(path)
        inner = [
            node
            for owner in ast.walk(tree)
            if isinstance(owner, (ast.Module, ast.ClassDef))
            for node in owner.body
        ]
        public = [
            node
            for node in inner
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and not node.name.startswith("_")
        ]
        if not ast.get_docstring(tree):
            missing.append(f"{path.relative_to(ROOT)}")
        for node in public:
            if not ast.get_docstring(node) and not _speaks_for_itself(node, tree):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not missing, "\n".join(missing)


def _speaks_for_itself(node, tree):
    """Small data holders whose fields are documented one by one, and methods: their class says what
    they are for."""
    if isinstance(node, ast.ClassDef):
        return all(
            isinstance(part, (ast.AnnAssign, ast.Expr, ast.FunctionDef)) for part in node.body
        )
    return node not in tree.body or node.end_lineno - node.lineno < 12


def test_no_file_is_a_drawer_for_everything():
    assert not [
        path
        for path in SOURCES
        if path.stem in ("utils", "util", "common", "types", "helpers", "misc")
    ]


def test_files_stay_within_their_length():
    limits: dict[str, int] = {}
    too_long = {
        name: lines
        for name, lines in (
            (str(p.relative_to(ROOT)), len(p.read_text().splitlines())) for p in SOURCES
        )
        if lines > limits.get(name, 400)
    }
    assert not too_long


def test_functions_fit_a_screen():
    too_long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1}"
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno >= 60
    ]
    assert not too_long, "\n".join(too_long)


def code_tokens(path):
    """Number of code tokens of a file, and of lines on which one starts; docstrings do not count."""
    text = path.read_text(encoding="utf-8")
    bare = set()
    for node in ast.walk(ast.parse(text)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            bare.update(range(node.lineno, node.end_lineno + 1))
    layout = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    starts = [t.start[0] for t in tokens if t.type not in layout and t.start[0] not in bare]
    return len(starts), len(set(starts))


def test_code_is_not_dense():
    counts = [code_tokens(path) for path in SOURCES]
    num_tokens = sum(tokens for tokens, _ in counts)
    density = num_tokens / sum(lines for _, lines in counts)
    print(f"{num_tokens:,} code tokens, {density:.2f} on a line")
    assert density <= 8.0


def test_kernels_imported_from_the_repository_root_are_not_ours(tmp_path):
    """transformers and sglang import a distribution of that name, which our folder must not shadow."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, importlib.util; atexit.register(lambda: print('found', importlib.util.find_spec('kernels')))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {
        "PYTHONPATH": str(tmp_path)
    }
    command = [sys.executable, "-m", "verippo.launch.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.startswith("usage: verippo COMMAND")
    assert "found " in done.stdout
    assert str(ROOT / "kernels") not in done.stdout


def test_the_interface_imports_without_deepspeed_flash_attn_sglang_or_wandb():
    modules = [name for name in INTERFACE if (ROOT / (name.replace(".", "/") + ".py")).exists()]
    assert len(modules) >= 7
    code = f"""
import importlib, sys

sys.modules["deepspeed"] = None  # as if it were not installed
for name in {modules!r} + ["rl.train", "launch.cli", "core.training.engine"]:
    importlib.import_module("verippo." + name)
imported = {{"flash_attn", "sglang", "wandb"}} & set(sys.modules)
assert not imported, imported
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_wheel_holds_every_source_and_data_file_and_works_when_installed(tmp_path):
    source = (
        tmp_path / "source"
    )  # a copy: setuptools writes beside what it builds, and would pack what lies there
    for package in ARROWS:
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    done = subprocess.run([*pip, *build], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("verippo-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    kinds = ("*.yaml", "*.jinja", "*.html", "py.typed")
    data = [path for package in ARROWS for kind in kinds for path in (ROOT / package).rglob(kind)]
    assert data
    wanted = {f"verippo/{path.relative_to(ROOT)}" for path in [*SOURCES, *data]}
    wanted = {name.replace("verippo/launch/package/", "verippo/") for name in wanted}
    assert wanted <= held, wanted - held
    assert not [
        name
        for name in held
        if name.split("/")[0] not in ("verippo",) and ".dist-info/" not in name
    ]

    target = tmp_path / "installed"
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(target), str(wheel)],
        check=True,
        capture_output=True,
    )
    code = (
        "import sys, verippo.core.training.packing as p, verippo.rl.train, verippo.launch.cli as c;"
        f"sys.exit(0 if all(m.__file__.startswith({str(target)!r}) for m in (p, verippo.rl.train, c)) else 'another copy')"
    )
    # -S leaves the editable install's finder out; the libraries come by path
    site = next(path for path in sys.path if path.endswith("site-packages"))
    environment = {"PYTHONPATH": f"{target}:{site}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert done.returncode == 0, done.stderr
