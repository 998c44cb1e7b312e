"""Who imports whom: networks know nothing of the toolkit, the toolkit has a direction, imports do nothing."""

import ast
import json
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from tiny import ROOT, run_python

# modules of restore that import no other one
LEAVES = {
    "degrade", "device", "distributed", "log", "manifest", "memory", "metrics", "real_graph", "report_record",
    "schema", "video",
}  # fmt: skip
# modules near the top -> the modules of restore that may import them
ONLY_FOR = {
    "__main__": set(),
    "demo": set(),
    "dry_run": set(),
    "scoring": set(),
    "options_schema": set(),
    "basicsr_bridge": set(),
    "report": {"scoring"},
    "training": {"dry_run"},
    "restoration": {"training"},
    "classification": {"training"},
    "action_scoring": set(),
    "action_scores": {"classification", "action_scoring"},
    "action_sets": {"classification", "action_scoring", "options_schema"},
    "evaluation": {"restoration", "scoring", "demo"},
    "test_sets": {"restoration", "scoring", "options_schema", "basicsr_bridge"},
    "data": {"restoration", "training", "options_schema", "basicsr_bridge"},
    "methods": {"restoration", "evaluation", "scoring", "demo"},
    "stream": {"methods", "demo", "budget", "seams", "__main__"},
    "budget": {"flags", "__main__"},
    "models": {"flags", "demo", "__main__"},
    "manifest": {"checkpoint"},
    "flags": {"__main__"},
    "seams": set(),
    "export": set(),
    "real_graph": {"export"},
    "jobs": {"demo", "__main__"},
    "privileged_training": {"run", "restoration", "training"},
    "explain": {"__main__"},
    "explain_watch": {"explain", "explain_pictures", "__main__"},
    "explain_pictures": {"explain"},
    "explain_drawing": {"explain_pictures"},
    "dialects": {"options"},
    "rewrite": {"dialects"},
}
NETWORKS_NEED = {"torch", "einops", "jaxtyping", "archs"}
TOOLKIT_NEEDS = {
    "torch", "einops", "jaxtyping", "archs", "restore",
    "numpy", "av", "cv2", "skimage", "safetensors", "yaml", "tqdm",
}  # fmt: skip
# imported where they are used
OPTIONAL = {
    "torchvision", "lpips", "basicsr", "mmcv", "tensorboard", "wandb", "lmdb", "pyiqa", "onnx", "onnxscript",
    "onnxruntime", "triton",
}  # fmt: skip
NETWORKS_MAY_USE = {"triton", "torchvision", "mmcv"}  # of those: what else samples deformably
ON_DEMAND = {"archs.layers.deform_triton", "archs.layers.deform_triton_attention"}  # made of Triton

NETWORKS = sorted((ROOT / "archs").rglob("*.py"))
TOOLKIT = sorted((ROOT / "restore").rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, *, functions: bool = True) -> set[str]:
    """Full names of the modules that a file imports, those within functions too or not."""
    known = {module_name(file) for file in (*NETWORKS, *TOOLKIT)}
    found = set()
    for node in _statements(ast.parse(path.read_text()), functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import; write the full name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & known  # `from restore import options` means the module
            found |= modules | ({node.module} if names - modules else set())
    return found


def _statements(node: ast.AST, functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _statements(child, functions)


def foreign(names: set[str], allowed: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} - allowed - sys.stdlib_module_names


@pytest.mark.parametrize("path", NETWORKS, ids=module_name)
def test_networks_import_torch_and_each_other(path):
    found = imports(path)
    assert not foreign(found, NETWORKS_NEED | NETWORKS_MAY_USE)
    if module_name(path) not in ON_DEMAND:
        always = imports(path, functions=False)
        assert not foreign(always, NETWORKS_NEED) and not always & ON_DEMAND
    ours = {name for name in found if name.partition(".")[0] == "archs"}
    if module_name(path).startswith("archs.layers"):
        assert all(name.startswith("archs.layers.") for name in ours)
    elif path.parent.name == "archs" and path.stem != "__init__":
        assert "archs" not in ours, "the table of networks imports the networks, not they the table"


@pytest.mark.parametrize("path", TOOLKIT, ids=module_name)
def test_the_toolkit_imports_what_is_always_installed(path):
    assert not foreign(imports(path, functions=False), TOOLKIT_NEEDS)
    assert not foreign(imports(path), TOOLKIT_NEEDS | OPTIONAL)


@pytest.mark.parametrize("path", TOOLKIT, ids=module_name)
def test_the_toolkit_has_a_direction(path):
    name = path.stem
    used = {module.removeprefix("restore.") for module in imports(path) if module.startswith("restore.")}
    if name in LEAVES:
        assert not used, f"{name} is a leaf"
    for module in used:
        assert name in ONLY_FOR.get(module, {name}), f"{name} imports {module}, which is above it"


def test_the_tables_name_modules():
    """A table with the names of modules that are gone would check nothing."""
    assert LEAVES | set(ONLY_FOR) <= {path.stem for path in TOOLKIT}


@pytest.mark.parametrize("paths", [NETWORKS, TOOLKIT], ids=["archs", "restore"])
def test_no_cycles(paths):
    names = {module_name(path) for path in paths}
    graph = {module_name(path): imports(path) & names for path in paths}
    assert len(list(TopologicalSorter(graph).static_order())) == len(names)


@pytest.mark.parametrize("folder", ["datasets", "options", "experiments", "results"])
def test_folders_of_data_hold_no_code(folder):
    """A package of such a common name would shadow another."""
    assert not list((ROOT / folder).glob("*.py"))


def test_the_reader_of_imports():
    """The checks above see what is written in any of the usual ways."""
    found = imports(Path(__file__))
    assert {"ast", "pytest", "tiny", "graphlib", "pathlib", "restore.options", "archs.layers.deform"} <= found
    assert "restore" not in found
    assert "archs.layers.deform" not in imports(Path(__file__), functions=False)


def _never_called() -> None:
    import archs.layers.deform
    from restore import options

    del archs, options


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> set[str]:
    """What a fresh interpreter holds once every module of ours is imported, in silence and without a trace on disk."""
    cache = tmp_path_factory.mktemp("cache")
    names = [name for path in (*NETWORKS, *TOOLKIT) if (name := module_name(path)) not in ON_DEMAND]
    code = f"import importlib, json, sys\nfor name in {names}: importlib.import_module(name)\n"
    done = run_python(code + "print(json.dumps(sorted(sys.modules)))", XDG_CACHE_HOME=str(cache))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("\n") == 1
    assert not list(cache.iterdir()), "a kernel is built on first use, not on import"
    modules = set(json.loads(done.stdout))
    assert set(names) <= modules
    return modules


def test_optional_packages_are_imported_where_they_are_used(loaded):
    assert not OPTIONAL & loaded


def test_importing_is_quick(loaded):
    """Dynamo takes as long to import as torch itself: more than a second at every start of a command."""
    assert "torch._dynamo" not in loaded
