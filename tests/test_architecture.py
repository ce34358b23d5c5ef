"""The floors of the library: imports point down, there are no circles, the face is lazy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lit_adapters"

# A file belongs to its longest matching entry; a folder ends in "/". Floor n imports floors <= n.
FLOORS = {
    "weights/": 1,
    "initialisers/": 1,
    "optim/": 1,
    "data/": 1,
    "losses.py": 1,
    "version.py": 1,
    "metrics/": 1,
    "throughput.py": 1,
    "holders.py": 1,
    "spread.py": 1,
    "adapters/": 2,
    "blocks/": 2,
    "targets.py": 2,
    "footprint.py": 3,
    "attachment.py": 3,
    "merging.py": 4,
    "gradient_factors.py": 3,
    "gradients.py": 4,
    "guards.py": 4,
    "initialisation.py": 4,
    "io.py": 4,
    "folder.py": 4,
    "prompting.py": 4,
    "known_tokens.py": 4,
    "peft_config.py": 4,
    "fingerprint.py": 4,
    "blockwise_attention.py": 4,
    "packed_rows.py": 5,
    "input_sharing.py": 4,
    "model_card.py": 4,
    "saved_settings.py": 4,
    "trained_state.py": 4,
    "base_model.py": 4,
    "quantization.py": 4,
    "precision.py": 4,
    "dense_weights.py": 4,
    "recompute.py": 4,
    "remainders.py": 4,
    "adapter_set.py": 5,
    "export.py": 5,
    "causal_lm.py": 5,
    "module.py": 5,
    "datamodule.py": 5,
    "alpaca_datamodule.py": 5,
    "batching.py": 5,
    "token_store.py": 5,
    "fit_loaders.py": 5,
    "first_steps.py": 5,
    "callbacks/": 5,
    "evaluation.py": 5,
    "generation.py": 5,
    "model_loss.py": 5,
    "portable_states.py": 5,
    "replicas.py": 5,
    "sharding.py": 5,
    "loading_once.py": 5,
    "agreement.py": 5,
    "compilation.py": 5,
    "estimate/memory_trace.py": 1,
    "estimate/": 6,
    "check/": 6,
    "suggestions.py": 6,
    "cli.py": 6,
    "commands.py": 6,
    "preview.py": 6,
    "__main__.py": 6,
}
FACE = "__init__.py"  # the root's: above every floor, imported by nobody inside

# What floor 1 may import beside torch and the standard library.
FLOOR_ONE_EXTRAS = {
    "weights/": {"transformers.pytorch_utils", "bitsandbytes"},
    "data/": {"datasets", "huggingface_hub", "safetensors"},  # read the hub; keep tokens
    "losses.py": {"liger_kernel"},
    "metrics/": {"torchmetrics", "regex", "sacrebleu"},
}
# Imports inside functions: packages that may be absent, or that few runs need and all wait for.
OPTIONAL = {"bitsandbytes", "datasets", "liger_kernel", "sacrebleu"}
LAZY_ENTRY = "__main__.py"  # imports the half of the command line that is asked for
VAGUE_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py", "tools.py"}

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES)


def test_the_package_is_there():
    assert FACE in FILES
    assert len(FILES) > 5


@cache  # one tree per file, so that nodes can be told apart by identity
def tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(), filename=file)


def entry(file: str) -> str:
    """The line of the floor table a file belongs to."""
    matches = [e for e in FLOORS if file == e or (e.endswith("/") and file.startswith(e))]
    assert matches, f"lit_adapters/{file} is on no floor: add it to FLOORS in {Path(__file__).name}"
    return max(matches, key=len)


def dotted(file: str) -> list[str]:
    parts = ["lit_adapters", *Path(file).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(file: str) -> Iterator[tuple[str, ast.stmt]]:
    """Absolute dotted name of everything a file imports, relative imports resolved."""
    package = dotted(file) if file.endswith("__init__.py") else dotted(file)[:-1]
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*prefix, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}", node


def own_file(name: str) -> str | None:
    """The file of the package an imported dotted name lives in; None for other packages."""
    parts = name.split(".")
    if parts[0] != "lit_adapters":
        return None
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[1:end])
        for candidate in (f"{path}.py", f"{path}/__init__.py", FACE if end == 1 else ""):
            if candidate.lstrip("/") in FILES:
                return candidate.lstrip("/")
    raise AssertionError(f"{name} is imported but is nowhere in the package")


def from_package(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@every_file
def test_every_file_stands_on_a_floor(file):
    if file != FACE:
        entry(file)


@every_file
def test_imports_point_down(file):
    if file == FACE:
        return
    here = entry(file)
    for name, node in imports_of(file):
        target = own_file(name)
        if target is None or target == file:
            continue
        assert target != FACE, f"{file}:{node.lineno} imports the package's face ({name})"
        there = entry(target)
        if FLOORS[here] == 1:
            assert here == there, f"{file}:{node.lineno} (floor 1) imports {name} of another folder"
        assert FLOORS[there] <= FLOORS[here], (
            f"{file}:{node.lineno} on floor {FLOORS[here]} imports {name} on floor {FLOORS[there]}"
        )


def test_there_are_no_circles():
    graph = {
        file: {own_file(name) for name, _ in imports_of(file)} - {None, file}
        for file in FILES
        if file != FACE
    }
    # A package's own __init__ only re-exports: its files may be reached through it from outside.
    finished: set[str] = set()

    def visit(file: str, path: tuple[str, ...]) -> None:
        assert file not in path, f"circle: {' -> '.join((*path[path.index(file) :], file))}"
        if file not in finished:
            for target in sorted(graph.get(file, ())):
                visit(target, (*path, file))
            finished.add(file)

    for file in graph:
        visit(file, ())


@every_file
def test_floor_one_knows_torch_and_the_standard_library_only(file):
    if file == FACE or FLOORS[entry(file)] != 1:
        return
    allowed = {"torch", "lit_adapters", *sys.stdlib_module_names}
    extras = FLOOR_ONE_EXTRAS.get(entry(file), set())
    for name, node in imports_of(file):
        assert from_package(name, allowed | extras), f"{file}:{node.lineno} imports {name}"


@every_file
def test_lightning_starts_on_floor_five(file):
    if file == FACE or FLOORS[entry(file)] >= 5:
        return
    for name, node in imports_of(file):
        assert not from_package(name, {"lightning", "pytorch_lightning", "lightning_fabric"}), (
            f"{file}:{node.lineno} imports {name} below floor 5"
        )


@every_file
def test_bitsandbytes_stays_in_weights_and_peft_is_a_test_dependency_only(file):
    for name, node in imports_of(file):
        assert not from_package(name, {"peft"}), f"{file}:{node.lineno} imports {name}"
        if from_package(name, {"bitsandbytes"}):
            assert file.startswith("weights/"), f"{file}:{node.lineno} imports {name}"


@every_file
def test_imports_inside_functions_are_of_optional_packages_only(file):
    if file == LAZY_ENTRY:
        return
    for function in ast.walk(tree(file)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        inside = {id(node) for node in ast.walk(function)}
        for name, node in imports_of(file):
            if id(node) in inside:
                assert from_package(name, OPTIONAL), f"{file}:{node.lineno} imports {name}"


@every_file
def test_only_the_face_imports_by_a_computed_name(file):
    if file == FACE:
        return
    names = {node.id for node in ast.walk(tree(file)) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)}
    assert not names & {"import_module", "__import__"}


@every_file
def test_nothing_is_unpickled_or_evaluated(file):
    for name, node in imports_of(file):
        if name == "pickle.UnpicklingError":  # an exception to catch
            continue
        assert not from_package(name, {"pickle", "dill", "cloudpickle", "joblib", "shelve"}), (
            f"{file}:{node.lineno} imports {name}"
        )
    called = {
        node.func.id
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"eval", "exec"}, file


@every_file
def test_no_file_has_a_name_that_says_nothing(file):
    assert Path(file).name not in VAGUE_NAMES


def test_files_are_read_and_written_without_knowing_the_kinds_of_adapters():
    from lit_adapters import adapters

    imported = {name.rpartition(".") for name, _ in imports_of("io.py")}
    ours = {name for module, _, name in imported if module.startswith("lit_adapters.adapters")}
    kinds = [getattr(adapters, name, None) for name in ours]
    assert ours
    assert not [k for k in kinds if isinstance(k, type) and issubclass(k, adapters.Adapter)]


@pytest.mark.parametrize("file", [f for f in FILES if f.endswith("/__init__.py")])
def test_a_folders_init_only_re_exports(file):
    for node in tree(file).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
        assert docstring or names or isinstance(node, ast.Import | ast.ImportFrom | ast.Delete), (
            f"{file}:{node.lineno} does more than re-export"
        )


# ---------------------------------------------------------------- the face


def python(code: str) -> str:
    """Standard output of a fresh interpreter in which every warning is an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, lit_adapters; dir(lit_adapters)\n"
        "heavy = {'torch', 'transformers', 'lightning', 'numpy', 'safetensors', 'bitsandbytes'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert python(code).strip() == "[]"


PUBLIC = [
    "LoRA",
    "Kaiming",
    "Gaussian",
    "attach",
    "detach",
    "merge",
    "initialise",
    "check_adapters_fire",
    "save_adapter",
    "load_adapter",
]


def test_public_names_resolve_and_are_listed():
    import lit_adapters

    assert set(PUBLIC) <= set(lit_adapters.__all__)
    for name in lit_adapters.__all__:
        assert callable(getattr(lit_adapters, name)) or name == "__version__", name
    assert set(lit_adapters.__all__) <= set(dir(lit_adapters))


def test_a_public_function_is_never_shadowed_by_a_module_of_the_same_name():
    modules = {Path(file).parts[0].removesuffix(".py") for file in FILES}
    assert not modules & set(PUBLIC)


def test_an_unknown_public_name_is_an_attribute_error_that_names_it():
    import lit_adapters

    with pytest.raises(AttributeError, match="lora_typo"):
        lit_adapters.lora_typo  # noqa: B018


def test_the_face_imports_nothing_eagerly_but_the_standard_library_and_its_version():
    guarded = {
        id(inner)
        for node in tree(FACE).body
        if isinstance(node, ast.If)
        for inner in ast.walk(node)
    }
    for name, node in imports_of(FACE):
        if id(node) not in guarded:
            allowed = {"lit_adapters.version", *sys.stdlib_module_names}
            assert from_package(name, allowed), f"{name} is eager"
    assert list(imports_of("version.py")) == []
