"""The project's own files agree with each other and keep the rules of the house."""

import ast
import json
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "lib" / "alignlens").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_dependency_is_pinned_and_locked_to_the_same_version():
    pins = locked()
    listed = project()["dependencies"] + project()["optional-dependencies"]["test"]
    for requirement in listed:
        name, version = requirement.split("==")
        assert pins.get(name) == version, f"{name}: pyproject says {version}, requirements.txt says {pins.get(name)}"


def test_lock_names_no_machine_and_no_index():
    text = (ROOT / "requirements.txt").read_text()
    assert not re.search(r"@|\+cpu|://|--index", text)


def test_conda_environment_installs_the_lock_with_the_same_python():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(d for d in conda["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert project()["requires-python"].startswith(f">={python.removeprefix('python=')}")
    pip = next(d["pip"] for d in conda["dependencies"] if isinstance(d, dict))
    assert "--requirement requirements.txt" in pip
    assert "--editable ." in pip


def test_readme_shows_the_two_commands_first():
    text = (ROOT / "README.md").read_text()
    assert text.index("make figures") < text.index("make test") < text.index("conda env create")
    assert "papermill notebooks/study.ipynb figures/tiny/study.ipynb" in text
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_what_is_shipped_stays_small():
    weights = list((ROOT / "data" / "tiny").rglob("*.safetensors"))
    assert weights
    assert sum(f.stat().st_size for f in weights) <= 20 * 2**20
    opaque = [f for f in (ROOT / "data").rglob("*") if f.suffix in {".pkl", ".pickle", ".pt", ".bin"}]
    assert not opaque


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_stripped_and_short(path):
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert all(c.get("id") for c in cells)
    assert not any(c["outputs"] or c["execution_count"] for c in code)
    assert sum("parameters" in c["metadata"].get("tags", []) for c in code) == 1
    sizes = [sum(bool(line.strip()) for line in "".join(c["source"]).splitlines()) for c in code]
    assert max(sizes) <= 25
    assert statistics.median(sizes) <= 8
    assert cells[0]["cell_type"] == "markdown" and "**Question.**" in "".join(cells[0]["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_says_what_it_does(path):
    """Words stand before what is done: never more than three cells of code in a row, and a third of all is text."""
    cells = json.loads(path.read_text())["cells"]
    kinds = "".join("c" if c["cell_type"] == "code" else "m" for c in cells)
    assert "cccc" not in kinds
    read = [
        c for c in cells if "parameters" not in c["metadata"].get("tags", [])
    ]  # a form to fill in is no code to read
    amount = {
        kind: sum(len("".join(c["source"])) for c in read if c["cell_type"] == kind) for kind in ("code", "markdown")
    }
    assert amount["markdown"] >= sum(amount.values()) / 3


def test_imports_point_one_way():
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_private_name_is_used_outside_its_package():
    for path in LIBRARY:
        package = path.relative_to(ROOT / "lib").parts[:2]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("alignlens"):
                own = tuple(node.module.split(".")[:2]) == tuple(part.removesuffix(".py") for part in package)
                private = [alias.name for alias in node.names if re.match("_[^_]", alias.name)]
                assert own or not private, f"{path.name} imports {private} from {node.module}"


def test_no_file_of_the_library_is_long():
    longest = max(LIBRARY, key=lambda path: len(path.read_text().splitlines()))
    assert len(longest.read_text().splitlines()) <= 400, longest


def test_no_file_speaks_of_a_machine():
    places = "|".join(["/ho" + "me/", "/ro" + "ot/", "/Us" + "ers/", "/tm" + "p/"])
    for path in [*(ROOT / "figures").rglob("*.ipynb"), *(ROOT / "data" / "tiny").rglob("*.json")]:
        assert not re.search(places, path.read_text()), path
