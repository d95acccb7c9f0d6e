"""The frame: the README's tree is true, everything imports, nothing names a machine."""

import ast
import importlib
import pkgutil
import re
import subprocess
from pathlib import Path

import groundup

ROOT = Path(__file__).parent.parent


def test_the_tree_in_the_readme_is_the_tree_on_disk():
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("```text\nsrc/groundup/\n")[1].split("```")[0]
    named = set(re.findall(r"^  (\w+)/ ", tree, flags=re.M))
    on_disk = {p.parent.name for p in (ROOT / "src/groundup").glob("*/__init__.py")}
    assert named == on_disk


def test_files_that_the_readme_names_exist():
    readme = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:src|docs|recipes|benchmarks)/[\w/.-]+)`", readme):
        assert (ROOT / name).exists(), name


def test_every_module_imports():
    for module in pkgutil.walk_packages(groundup.__path__, "groundup."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as err:
            if err.name != "triton":  # the kernels of a GPU need it, and only they
                raise
            assert module.name.startswith("groundup.model.gpu_")


def test_benchmarks_import_what_is_there():
    """Looked up, not run: most of their peers are not installed here."""
    names = [
        (path.name, node.module, alias.name)
        for path in (ROOT / "benchmarks").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("groundup")
        for alias in node.names
    ]
    modules = {module.name for module in pkgutil.walk_packages(groundup.__path__, "groundup.")}
    assert names
    for where, module, name in names:
        there = f"{module}.{name}" in modules or hasattr(importlib.import_module(module), name)
        assert there, f"{where}: {name} is not in {module}"


def test_every_public_name_is_there():
    assert sorted(groundup.__all__) == sorted(groundup._HOMES)
    importlib.import_module("groundup.align")  # the import of a sub-package hides no function
    importlib.import_module("groundup.evaluate")
    for name in groundup.__all__:
        for _ in range(2):
            assert callable(getattr(groundup, name)), name
    assert set(groundup.__all__) <= set(dir(groundup))
    assert groundup.__version__


def test_a_page_a_stage():
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {"data", "tokenizer", "model", "train", "align", "generate", "serve"} <= pages
    assert {"evaluate", "recipe", "BENCH"} <= pages


def test_the_repository_speaks_of_the_project_alone():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    forbidden = re.compile(r"/(work|root|home)/|\bpypi\b|pythonhosted", re.I)
    for name in listed.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", "") and path.is_file():
            if name == "tests/test_frame.py":
                continue
            found = forbidden.search(path.read_text(errors="ignore"))
            assert found is None, f"{name}: {found[0]}"
