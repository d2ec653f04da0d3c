"""What comes from outside comes in by `mpqsearch.untrusted`: nothing else reads JSON, TOML, pickles or expressions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "mpqsearch"

DOORS = {
    "json.load": (),
    "json.loads": ("untrusted.py", "errors.py"),  # the latter what pip wrote of this package
    "tomllib.load": (),
    "tomllib.loads": ("untrusted.py", "toml_text.py"),  # the latter asks whether what it wrote is read back
    "yaml.load": ("prompts/reading.py",),  # by the loader that makes texts, lists and tables only
    "torch.load": ("metrics/lpips.py",),  # torchvision has its weights as pickles: tensors alone (weights_only)
    "pickle.load": (),
    "pickle.loads": (),
    "np.load": (),
    "np.loadtxt": (),
    "np.genfromtxt": (),
    "np.lib.format.read_array": (),
}
"""What reads text or objects, and the only modules that may call it."""

OWN = ("export/reading.py", "export/names.py")

EXPRESSIONS = {f"re.{name}" for name in ("compile", "match", "search", "fullmatch", "findall", "sub", "split")}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Module, name of what is called, and call, of the whole package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                yield file.relative_to(PACKAGE).as_posix(), ast.unparse(node.func), node


def written_out(pattern: ast.expr) -> bool:
    """Whether an expression is a text, in parts from upper-case constants or escaped."""
    if isinstance(pattern, ast.JoinedStr):
        return all(written_out(part.value) for part in pattern.values if isinstance(part, ast.FormattedValue))
    if isinstance(pattern, ast.Name):
        return pattern.id.isupper()
    escaped = isinstance(pattern, ast.Call) and ast.unparse(pattern.func) in ("re.escape", "'|'.join")
    return escaped or isinstance(pattern, ast.Constant)


def test_only_the_door_reads_what_comes_from_outside() -> None:
    wrong = [
        f"{module}:{node.lineno} {name}" for module, name, node in calls() if module not in DOORS.get(name, (module,))
    ]
    assert wrong == []


def test_expressions_of_files_are_limited() -> None:
    """`mpqsearch.export.reading.Pattern` looks at one before it compiles it, and gives others a limit of time; the
    tables of `mpqsearch.export.names` are its own."""
    wrong = [
        f"{module}:{node.lineno} {ast.unparse(node)}"
        for module, name, node in calls()
        if name in EXPRESSIONS and module not in OWN and not written_out(node.args[0])
    ]
    assert wrong == []
