"""What holds of every script as a text: it stands alone, and what it shares with another is the same text."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [name for name in ("stsac", "stddpg", "stac_ac", "toy_game") if (ROOT / f"{name}.py").exists()]
# where the algorithms differ; everything else that two scripts define is a copy
DIFFERENT = {
    *("Args", "check_args", "Actor", "Critic", "actor_loss", "td_target", "critic_loss"),
    *("gauss_newton_gradients", "player_gradients", "check_jacobian", "stackelberg_update", "evaluate", "train"),
}
# stac_ac: discrete actions and unbounded ones are allowed; its networks have tanh units
DIFFERENT_ON_POLICY = {"make_env", "mlp"}


def parse(script):
    text = (ROOT / f"{script}.py").read_text()
    return text, ast.parse(text)


def definitions(script):
    text, tree = parse(script)
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: ast.get_source_segment(text, node) for node in tree.body if isinstance(node, kinds)}


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_copies_are_identical(script):
    ours, theirs = definitions(script), definitions("stsac")
    common = (ours.keys() & theirs.keys()) - DIFFERENT
    common -= {"toy_game": {"main"}, "stac_ac": DIFFERENT_ON_POLICY}.get(script, set())
    assert {name: ours[name] for name in common} == {name: theirs[name] for name in common}


def test_the_off_policy_scripts_have_the_same_shape():
    """The same functions in the same order, and every copy is one that the test above compares."""
    assert list(definitions("stddpg")) == list(definitions("stsac"))
    assert len(definitions("stsac").keys() - DIFFERENT) >= 15
    names = "conjugate_gradient stackelberg_gradient jacobian_factors gauss_newton_preconditioner ReplayBuffer"
    assert {"reset", "save", "load", "main", *names.split()} <= definitions("stddpg").keys() - DIFFERENT


def test_the_on_policy_script_copies_what_it_can():
    """What it has of its own belongs to collecting a batch; all else is a copy or one of the names that differ."""
    ours, theirs = definitions("stac_ac").keys(), definitions("stsac").keys()
    off_policy = {"ReplayBuffer", "actor_loss", "td_target", "player_gradients", "check_jacobian"}
    tangent_kernel = {"jacobian_factors", "vjp", "tangent_kernel", "ridge_solver"}
    assert theirs - ours == off_policy | tangent_kernel | {"gauss_newton_preconditioner", "gauss_newton_gradients"}
    copies = (ours & theirs) - DIFFERENT - DIFFERENT_ON_POLICY
    solver = {"conjugate_gradient", "grad", "flatten", "total_derivative", "stackelberg_gradient", "optimizer_step"}
    assert copies == solver | {"save", "load", "stop", "reset", "main"}


# the aim is 600, 560, 560, 420
LINES = {"stsac": 665, "stddpg": 651, "stac_ac": 659, "toy_game": 418}


@pytest.mark.parametrize("script", SCRIPTS)
def test_length(script):
    """They are to be read at one sitting: a line that is added has to take another's place."""
    text, tree = parse(script)
    assert text.count("\n") <= LINES[script]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < (120 if node.name == "train" else 40), node.name


def test_the_maths_stands_together():
    """From the first loss to the update, in the paper's order, with nothing between."""
    _, tree = parse("stsac")
    lines = {node.name: (node.lineno, node.end_lineno) for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert lines["stackelberg_update"][1] - lines["actor_loss"][0] < 260
    order = (
        "actor_loss td_target critic_loss conjugate_gradient stackelberg_gradient player_gradients stackelberg_update"
    )
    assert [lines[name] for name in order.split()] == sorted(lines[name] for name in order.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_shares_nothing(script):
    _, tree = parse(script)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert not imported & set(SCRIPTS)
    # under __main__ there is nothing but a call, so that everything can be imported
    last = tree.body[-1]
    assert isinstance(last, ast.If) and [type(node) for node in last.body] == [ast.Expr]


@pytest.mark.parametrize("script", SCRIPTS)
def test_header_names_its_dependencies(script):
    """PEP 723: the header is valid TOML, and asks for what pyproject.toml asks for."""
    tomllib = pytest.importorskip("tomllib")
    text, tree = parse(script)
    block = re.match(r"# /// script\n((?:#(?: .*)?\n)+?)# ///\n", text).group(1)
    header = tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert header["requires-python"] == project["requires-python"]
    allowed = set(project["dependencies"]) | set(project["optional-dependencies"]["plot"])
    assert set(header["dependencies"]) <= allowed
    # and every import comes from there, from the standard library, or is an extra that is imported when it is asked for
    names = {re.match(r"[\w-]+", line).group() for line in header["dependencies"]}
    top = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert top - set(sys.stdlib_module_names) <= names
