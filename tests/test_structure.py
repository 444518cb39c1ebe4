"""The rules and budgets of the source tree: who may import whom, and how long everything may be.

    python tests/test_structure.py               # prints the numbers and every rule that is broken
    python -m pytest tests/test_structure.py

Each rule is a function of the tree's root that returns its problems, one line each. It reads the files.
"""

import ast
import io
import shutil
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = (
    "model",
    "train",
    "inherit",
    "analyze_attention",
    "prepare_data",
)  # by the user: they stay at the top
VERBS = {*NAMED, "inheritune", "report", "sample", "bench", "minimal"} - {"model"}  # scripts that people run
FILE_LINES, FUNCTION_LINES, LOOP_LINES, RAISES = 350, 60, 100, 90
# Not yet within their budgets: 3,400 lines in all, 2,300 at the top; loaded by analyze_attention 1,200.
# These numbers are what was reached. The first two rose from 3,870 and 2,580 with other families, tokenizers of models,
# half width; then with Muon and ablation.py; then with the block that is compiled for all layers.
LINES, TOP_LINES, LONG_SHARE = 4423, 2857, 0.05
CLOSURES = {"train": 1400, "inherit": 850, "analyze_attention": 1530}  # lines that a script loads at its start


# ---- reading the files


def top(root: Path) -> list[Path]:
    return sorted(root.glob("*.py"))


def files(root: Path) -> list[Path]:
    """The source files of the tree, without tests."""
    return top(root) + sorted((root / "plumbing").glob("*.py"))


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def count(paths) -> int:
    return sum(len(lines(path)) for path in paths)


def imports(path: Path, at_start: bool) -> set[str]:
    """Full names of the modules that a file imports: all, or only those that are loaded when it starts."""
    found, nodes = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    for node in nodes:  # the list grows while it is walked
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):  # "from plumbing import storage" may name a module
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif not (at_start and isinstance(node, ast.FunctionDef | ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return found


def ours(root: Path, names: set[str]) -> set[str]:
    """Those of the modules that are files of the tree."""
    return {name for name in names if (root / f"{name.replace('.', '/')}.py").is_file()} | (
        names & {"plumbing"}
    )


def closure(root: Path, script: str) -> set[Path]:
    """The files that a script loads at its start, itself counted."""
    found, todo = set(), [script]
    while todo:
        name = todo.pop()
        path = root / ("plumbing/__init__.py" if name == "plumbing" else f"{name.replace('.', '/')}.py")
        if path not in found:
            found.add(path)
            todo += ours(root, imports(path, at_start=True))
    return found


def functions(root: Path) -> list[tuple[int, str]]:
    """(lines, "file:name") of every function, the longest first."""
    found = []
    for path in files(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                found.append((node.end_lineno - node.lineno + 1, f"{path.relative_to(root)}:{node.name}"))
    return sorted(found, reverse=True)


def raises(root: Path) -> int:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files(root)]
    return sum(isinstance(node, ast.Raise) for tree in trees for node in ast.walk(tree))


def commented(path: Path, docstrings: bool) -> set[int]:
    """Numbers of the lines that carry a # comment, or belong to a docstring too."""
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for node in ast.walk(ast.parse(text)) if docstrings else ():
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def comment_share(root: Path, docstrings: bool) -> float:
    return sum(len(commented(path, docstrings)) for path in files(root)) / count(files(root))


# ---- the rules


def within(problem: str, found: float, budget: float) -> list[str]:
    return [f"{problem}: {found}, at most {budget}"] if found > budget else []


def lines_in_all(root: Path) -> list[str]:
    return within("lines in all", count(files(root)), LINES)


def lines_at_the_top(root: Path) -> list[str]:
    return within("lines at the top", count(top(root)), TOP_LINES)


def lines_of_a_file(root: Path) -> list[str]:
    return [problem for path in files(root) for problem in within(path.name, len(lines(path)), FILE_LINES)]


def lines_that_a_script_loads(root: Path) -> list[str]:
    loaded = {script: count(closure(root, script)) for script in CLOSURES}
    return [
        problem for script in loaded for problem in within(f"{script}.py", loaded[script], CLOSURES[script])
    ]


def lines_of_a_function(root: Path) -> list[str]:
    budget = {"train.py:loop": LOOP_LINES}
    return [line for n, name in functions(root) for line in within(name, n, budget.get(name, FUNCTION_LINES))]


def number_of_raise_statements(root: Path) -> list[str]:
    return within("raise statements", raises(root), RAISES)


def line_length(root: Path) -> list[str]:
    lengths = {
        f"{p.relative_to(root)}:{i}": len(s) for p in files(root) for i, s in enumerate(lines(p), start=1)
    }
    problems = [problem for place, n in lengths.items() for problem in within(place, n, 110)]
    share = sum(n > 100 for n in lengths.values()) / len(lengths)
    return problems + within("share of lines over 100 characters", round(share, 3), LONG_SHARE)


def no_format_is_skipped(root: Path) -> list[str]:
    places = [
        (f"{path.name}:{i}", line) for path in files(root) for i, line in enumerate(lines(path), start=1)
    ]
    return [f"{place}: fmt: skip" for place, line in places if "# fmt: skip" in line]


def plumbing_imports_model_and_itself(root: Path) -> list[str]:
    problems = []
    for path in (root / "plumbing").glob("*.py"):
        found = ours(root, imports(path, at_start=False))
        problems += [
            f"{path.name} imports {name}" for name in found if name.split(".")[0] not in ("plumbing", "model")
        ]
    return problems


def minimal_imports_model_alone(root: Path) -> list[str]:
    found = ours(root, imports(root / "minimal.py", at_start=False))
    return [f"minimal.py imports {name}" for name in found - {"model"}]


def only_the_recipe_and_the_benchmark_import_verbs(root: Path) -> list[str]:
    """train.py may import analyze_attention too, but not at its start."""
    problems = []
    for path in top(root):
        at_start, all_of_it = (imports(path, at_start=each) & VERBS for each in (True, False))
        allowed = {"analyze_attention"} - at_start if path.stem == "train" else set()
        if path.stem not in ("inheritune", "bench"):
            problems += [f"{path.name} imports {name}" for name in all_of_it - allowed]
    return problems


def named_files_at_the_top(root: Path) -> list[str]:
    return [f"no {name}.py at the top" for name in NAMED if not (root / f"{name}.py").is_file()]


def one_line_in_six_has_a_comment(root: Path) -> list[str]:
    share = comment_share(root, docstrings=True)
    return [f"comments on {share:.1%} of all lines, at least one in six"] if share < 1 / 6 else []


# rule -> what breaks it: a file, and the text to append to it (None: the file is removed)
RULES = {
    lines_in_all: ("model.py", "\n" * LINES),
    lines_at_the_top: ("model.py", "\n" * TOP_LINES),
    lines_of_a_file: ("plumbing/machine.py", "\n" * FILE_LINES),
    lines_that_a_script_loads: ("plumbing/configurator.py", "\n" * max(CLOSURES.values())),
    lines_of_a_function: ("train.py", "def long():\n" + "    pass\n" * FUNCTION_LINES),
    number_of_raise_statements: ("data.py", "def all_of_them():\n" + "    raise ValueError\n" * (RAISES + 1)),
    line_length: ("sample.py", f"x = '{'x' * 110}'\n"),
    no_format_is_skipped: ("sample.py", "x = [1,2]  # fmt: skip\n"),
    plumbing_imports_model_and_itself: ("plumbing/storage.py", "def late():\n    import data\n"),
    minimal_imports_model_alone: ("minimal.py", "from plumbing.storage import verify\n"),
    only_the_recipe_and_the_benchmark_import_verbs: ("sample.py", "from train import learning_rate\n"),
    named_files_at_the_top: ("inherit.py", None),
    one_line_in_six_has_a_comment: ("data.py", "x = 1\n" * 9999),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_its_rules(rule):
    assert rule(ROOT) == []


def copied(tmp_path: Path) -> Path:
    for path in files(ROOT):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    return tmp_path


def append(path: Path, text: str):
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_that_is_broken_is_reported(rule, tmp_path):
    root, (name, text) = copied(tmp_path), RULES[rule]
    before = rule(root)
    if text is None:
        (root / name).unlink()
    else:
        append(root / name, text)
    assert set(rule(root)) - set(before)


@pytest.mark.parametrize(
    "name,text,rule",
    [
        ("train.py", "import analyze_attention\n", only_the_recipe_and_the_benchmark_import_verbs),
        ("train.py", "def late():\n    import inherit\n", only_the_recipe_and_the_benchmark_import_verbs),
        ("train.py", "class Late:\n    import report\n", only_the_recipe_and_the_benchmark_import_verbs),
        ("data.py", "if True:\n    import train\n", only_the_recipe_and_the_benchmark_import_verbs),
        ("plumbing/figures.py", "from baselines import CLAIMS\n", plumbing_imports_model_and_itself),
        ("minimal.py", "import data\n", minimal_imports_model_alone),
        (
            "model.py",
            "def loop():\n" + "    pass\n" * LOOP_LINES,
            lines_of_a_function,
        ),  # only train.py's is longer
        ("model.py", f"# {'x' * 101}\n" * 500, line_length),  # allowed, but too many
    ],
)
def test_the_rules_look_everywhere(name, text, rule, tmp_path):
    root = copied(tmp_path)
    before = rule(root)
    append(root / name, text)
    assert set(rule(root)) - set(before)


def test_an_import_inside_a_function_is_not_loaded_at_the_start(tmp_path):
    root = copied(tmp_path)
    before = count(closure(root, "inherit"))
    append(root / "inherit.py", "def late():\n    import train\n")
    assert count(closure(root, "inherit")) == before + 2
    append(root / "inherit.py", "import minimal\n")  # which imports model
    assert count(closure(root, "inherit")) == before + 3 + count([root / "minimal.py", root / "model.py"])


def main():
    print(f"lines in all                      {count(files(ROOT)):>7,}")
    print(f"lines at the top                  {count(top(ROOT)):>7,}")
    longest = max(files(ROOT), key=lambda path: len(lines(path)))
    print(f"longest file                      {len(lines(longest)):>7,}  {longest.relative_to(ROOT)}")
    for script in CLOSURES:
        print(f"loaded by {script:23s} {count(closure(ROOT, script)):>7,}")
    print(f"raise statements                  {raises(ROOT):>7,}")
    for n, name in functions(ROOT)[:5]:
        print(f"long function                     {n:>7,}  {name}")
    print(f"lines with a # comment            {comment_share(ROOT, docstrings=False):>7.1%}")
    print(f"lines with one or of a docstring  {comment_share(ROOT, docstrings=True):>7.1%}")
    broken = {rule.__name__: problems for rule in RULES if (problems := rule(ROOT))}
    for name, problems in broken.items():
        print(f"broken: {name}: {len(problems)} times: {'; '.join(problems[:5])}")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
