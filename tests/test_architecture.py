"""The architecture, checked by reading the code: imports go down only, sizes stay small, nothing swallows or hides."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_OURS = {"tests", "build", "workflows"}  # no parts of the package

FAMILY = (
    *("core/ops", "core/blocks", "core/weights/keymap", "core/weights/identity", "core/weights/export"),
    "core/weights/vocabulary",
    *("core/conditioning", "core/memory/trace", "core/past", "core/picture", "core/text", "core/types"),
)
# Layer (the longest name that fits a module) -> the layers below, which it may import. A layer may import itself.
ALLOWED = {
    "kernels": (),
    "core": (),
    "core/types": (),
    "core/storage": ("core/types",),
    "core/dfloat11": (),
    "core/tiles": ("core/types",),
    "core/picture": ("core/types",),
    "core/tiny_decoder": (),
    "core/host": ("core/tiny_decoder", "core/types"),
    "core/conditioning": ("core/types",),
    "core/text": ("core/weights", "core/ops", "core/memory", "core/host", "core/types"),
    "core/ops": ("kernels", "core/host", "core/storage", "core/dfloat11", "core/types"),
    "core/weights": ("core/ops", "core/host", "core/storage", "core/dfloat11", "core/types"),
    "core/memory": ("core/ops", "core/host", "core/types"),
    "core/blocks": ("core/memory", "core/ops", "core/host", "core/types"),
    "core/compiling": (),
    "core/sampling": ("core/blocks", "core/ops", "core/host", "core/types"),
    "core/pace": (),
    "core/planning": (
        *("core/memory", "core/blocks", "core/sampling", "core/ops", "core/weights/adapters", "core/host"),
        "core/types",
    ),
    "core/past": ("core/host",),
    "core/codec": ("core/tiles", "core/past", "core/memory", "core/ops", "core/host", "core/types"),
    "core/report": (
        *("core/planning", "core/weights", "core/memory", "core/sampling", "core/ops", "core/host", "core/types"),
    ),
    "core/runtime": (
        *("core/report", "core/planning", "core/pace", "core/compiling", "core/weights", "core/memory", "core/blocks"),
        *("core/sampling", "core/ops", "core/host", "core/types"),
    ),
    "wan": FAMILY,
    "qwen_image": FAMILY,
    "qwen_image/family": (*FAMILY, "qwen_image", "wan/vae"),  # the same VAE in the world too
    "families": ("wan", "qwen_image", "core/weights/lora", "core/types"),
    "loading": ("downloads", "families", "wan", "qwen_image", "core"),
    "inspection": ("families", "core"),
    "conversion": ("loading", "families", "wan", "qwen_image", "core"),
    "plans": ("wan", "qwen_image", "core"),
    "doctor": ("kernels", "core"),
    "media": ("core/host",),
    "downloads": (),
    "nodes": ("downloads", "plans", "loading", "families", "inspection", "media", "wan", "qwen_image", "core"),
    "demo": ("loading", "families", "media", "wan", "qwen_image", "core"),
    "bench": ("demo", "plans", "conversion", "loading", "families", "wan", "qwen_image", "core", "kernels"),
    "commands": (
        *("downloads", "demo", "doctor", "plans", "loading", "families", "inspection", "conversion", "media"),
        *("wan", "qwen_image", "core"),
    ),
    "__main__": (),
    "__init__": ("nodes",),
}
COMFY = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "server", "execution"}
KNOWS_COMFY = {"nodes", "core/host", "__init__"}
# Slow to import, or not everywhere: only inside the function that needs it, or in a kernel's own file.
HEAVY = {
    *("transformers", "accelerate", "tokenizers", "sentencepiece", "huggingface_hub", "ftfy", "av", "PIL"),
    *("triton", "diffusers", "gguf", "cupy", "sageattention", "flash_attn", "xformers", "bitsandbytes"),
}
TALKS_TO_A_TERMINAL = {"__main__", "commands", "demo", "bench"}
SERVES_ALL = ("core/sampling", "core/memory", "core/ops", "core/text", "core/picture", "core/conditioning")
FAMILY_NAME = re.compile(r"(?<![a-z])wan(?!t)|qwen|umt5|lightning", re.IGNORECASE)
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 500, 80, 8


@dataclass(frozen=True)
class Module:
    """One source file; `name` is its path without the ending, a package's being its folder."""

    path: Path
    name: str
    is_package: bool

    @property
    def layer(self) -> str | None:
        fitting = [layer for layer in ALLOWED if _within(self.name, layer)]
        return max(fitting, key=len, default=None)

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))


def _within(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}/")


def _modules() -> list[Module]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in NOT_OURS or any(part.startswith(".") for part in relative.parts):
            continue
        is_package = path.name == "__init__.py"
        name = relative.with_suffix("").as_posix()
        found.append(Module(path, name.removesuffix("/__init__"), is_package))
    return found


MODULES = _modules()
each_module = pytest.mark.parametrize("module", MODULES, ids=[module.name for module in MODULES])


@dataclass(frozen=True)
class Import:
    """One imported name: a module of ours (`core/ops/norm`), or with `outside` the first word of another module."""

    target: str
    outside: bool
    on_import: bool
    line: int


def _imports(module: Module) -> Iterator[Import]:
    tree = module.tree
    later = _nodes_that_run_later(tree)
    here = [] if module.name == "__init__" else module.name.split("/")[: None if module.is_package else -1]
    for node in ast.walk(tree):
        on_import = id(node) not in later
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name.split(".")[0], True, on_import, node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield Import(node.module.split(".")[0], True, on_import, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - (node.level - 1)] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                full = "/".join([*base, alias.name])
                is_module = (ROOT / f"{full}.py").exists() or (ROOT / full / "__init__.py").exists()
                yield Import(full if is_module else "/".join(base), False, on_import, node.lineno)


def _nodes_that_run_later(tree: ast.Module) -> set[int]:
    """Return the ids of nodes inside functions and under TYPE_CHECKING."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    parts = [
        node
        for node in ast.walk(tree)
        if isinstance(node, functions)
        or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
    ]
    return {id(inner) for part in parts for inner in ast.walk(part)}


@each_module
def test_imports_go_down(module: Module) -> None:
    assert module.layer, f"{module.name} belongs to no layer: add one to ALLOWED, or move the file"
    allowed, wrong = (*ALLOWED[module.layer], module.layer), []
    for found in _imports(module):
        target, line = found.target, found.line
        if found.outside:
            continue
        if _within(target, "kernels") and target != "kernels" and module.layer != "kernels":
            wrong.append(f"line {line}: ask kernels.find() for {target}, never import it")
        elif not any(_within(target, layer) for layer in allowed):
            wrong.append(f"line {line}: {module.name} must not import {target or 'the root package'}")
    assert not wrong, "\n".join(wrong)


@each_module
def test_imports_from_outside(module: Module) -> None:
    wrong, ours = [], {path.name for path in ROOT.iterdir() if path.is_dir()} | {"wanqwen"}
    kernel_file = module.layer == "kernels" and not module.is_package
    for found in _imports(module):
        if not found.outside:
            continue
        if found.target in ours:
            # In ComfyUI these names are its own modules, or nobody's: our folder has another name there.
            wrong.append(f"line {found.line}: `import {found.target}`: modules of ours are imported relatively")
        if found.target in HEAVY and found.on_import and not kernel_file:
            wrong.append(f"line {found.line}: import {found.target} inside the function that needs it")
        if found.target in COMFY and module.layer not in KNOWS_COMFY:
            wrong.append(f"line {found.line}: {found.target} is ComfyUI's; only {sorted(KNOWS_COMFY)} know of it")
    assert not wrong, "\n".join(wrong)


@each_module
def test_sizes(module: Module) -> None:
    wrong, lines = [], len(module.path.read_text(encoding="utf-8").splitlines())
    if lines > MAX_FILE_LINES:
        wrong.append(f"{lines} lines, more than {MAX_FILE_LINES}: split where there is a second reason to change")
    for function in _functions(module):
        if _is_schema(module, function):
            continue
        size = function.end_lineno - function.lineno + 1
        arguments = [a for a in (*function.args.args, *function.args.kwonlyargs) if a.arg not in ("self", "cls")]
        if size > MAX_FUNCTION_LINES:
            wrong.append(f"line {function.lineno}: {function.name} has {size} lines, more than {MAX_FUNCTION_LINES}")
        if len(arguments) > MAX_ARGUMENTS:
            wrong.append(f"line {function.lineno}: {function.name} takes {len(arguments)} arguments: pass a record")
    assert not wrong, "\n".join(wrong)


@each_module
def test_nothing_is_swallowed_or_hidden(module: Module) -> None:
    wrong = []
    for function in _functions(module):
        if function.args.kwarg and module.layer != "nodes":
            wrong.append(
                f"line {function.lineno}: {function.name} takes **{function.args.kwarg.arg}: name what it takes"
            )
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Global):
            wrong.append(f"line {node.lineno}: global {', '.join(node.names)}")
        elif isinstance(node, ast.ExceptHandler) and (node.type is None or _is_broad(node.type)):
            wrong.append(f"line {node.lineno}: catches everything: name the errors")
        elif (
            isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and module.layer not in TALKS_TO_A_TERMINAL
        ):
            wrong.append(f"line {node.lineno}: print: use the log")
    assert not wrong, "\n".join(wrong)


@each_module
def test_no_family_is_named_where_all_are_served(module: Module) -> None:
    """In text, names and comments: what runs any model must not be shaped by one."""
    if not module.name.startswith(SERVES_ALL):
        return
    lines = module.path.read_text(encoding="utf-8").splitlines()
    wrong = [f"line {i}: {line.strip()}" for i, line in enumerate(lines, 1) if FAMILY_NAME.search(line)]
    assert not wrong, "\n".join(wrong)


def _functions(module: Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _is_schema(module: Module, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Say whether a function is as long, or takes as much, as what it describes: a node's inputs, a Triton kernel."""
    return module.layer == "nodes" or any("triton" in ast.unparse(decorator) for decorator in function.decorator_list)


def _is_broad(kind: ast.expr) -> bool:
    names = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(ast.unparse(name) in ("Exception", "BaseException") for name in names)


# The checks above read code, so here is code that each must object to.
BAD = {
    test_imports_go_down: ("core/ops/x.py", "from ...wan import config", "must not import wan/config"),
    test_imports_from_outside: ("wan/x.py", "import transformers", "inside the function"),
    test_sizes: ("wan/x.py", "def f(a, b, c, d, e, f, g, h, i): ...", "pass a record"),
    test_no_family_is_named_where_all_are_served: ("core/ops/x.py", "if family == 'wan21': ...", "line 1"),
    test_nothing_is_swallowed_or_hidden: ("wan/x.py", "try: pass\nexcept Exception: pass", "name the errors"),
}


@pytest.mark.parametrize("check", BAD, ids=lambda check: check.__name__)
def test_checks_can_fail(check, tmp_path: Path) -> None:
    name, code, complaint = BAD[check]
    path = tmp_path / "x.py"
    path.write_text(code)
    with pytest.raises(AssertionError, match=complaint):
        check(Module(path, name.removesuffix(".py"), False))


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("wan/x", "from comfy import utils"),
        ("wan/x", "from core.ops import norm"),
        ("core/sampling/x", "def f():\n    import folder_paths"),
    ],
)
def test_imports_that_only_work_by_luck_are_found(name: str, code: str, tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(code)
    with pytest.raises(AssertionError, match="line"):
        test_imports_from_outside(Module(path, name, False))
