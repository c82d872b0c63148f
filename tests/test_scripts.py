"""What holds of every script as a text: it stands alone, and what it shares with another is the same code."""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["stsac", "stddpg", "stac_ac", "toy_game"]
# functions and classes of one name that have another purpose in stsac.py, because the algorithms differ
DIFFERENT = set(
    "Args check_args Actor Critic actor_loss td_target critic_loss critic_cost player_gradients stackelberg_update "
    "check_gauss_newton update_scalars check_first_batch train training_loop".split()
)
DIFFERENT_IN = {
    "stddpg": DIFFERENT,
    # actions may be unbounded and discrete; units are tanh; a policy is evaluated as it acts
    "stac_ac": DIFFERENT | {"make_env", "mlp", "evaluate"},
    "toy_game": DIFFERENT | {"main"},
}
# copies from which something is deleted that the script does not need; the others are the same, word for word
SHORTER_IN = {
    "stddpg": {"evaluate", "check_targets"},
    "stac_ac": {"conjugate_gradient", "stackelberg_gradient", "restore"},
    "toy_game": set(),
}
# what stac_ac.py lacks of stsac.py: no replay buffer, no target networks, Gauss-Newton by autograd alone
OFF_POLICY = set(
    "to_box ReplayBuffer actor_loss td_target check_shape update_target RecordLayers refuse check_layers jacobians "
    "stack_rows rows jvp vjp tangent_kernel ridge_solver q_derivatives needs_jacobian gauss_newton_gradient "
    "gauss_newton_preconditioner differ check_gauss_newton check_targets critic_cost".split()
)


def parse(script):
    text = (ROOT / f"{script}.py").read_text()
    return text, ast.parse(text)


def definitions(script):
    """{name: the words of a function's or class's code}, docstrings and comments aside."""
    words = {}
    for node in parse(script)[1].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part) is not None:
                    del part.body[0]
            code = io.StringIO(ast.unparse(node))
            words[node.name] = [token.string.strip() for token in tokenize.generate_tokens(code.readline)]
    return words


def is_part(short, long):
    """Whether the words of one are what is left of the other's when some are deleted."""
    rest = iter(long)
    return all(word in rest for word in short)


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_copies_differ_by_deletion_alone(script):
    """Of what a script does not need, in the functions above; all else of one name is the same."""
    ours, theirs = definitions(script), definitions("stsac")
    copies = (ours.keys() & theirs.keys()) - DIFFERENT_IN[script]
    assert {k for k in copies if ours[k] != theirs[k]} == SHORTER_IN[script]
    assert all(is_part(ours[k], theirs[k]) for k in copies)


def test_the_comparison_of_copies_compares():
    """The same functions in the same order off policy; on policy all but what is known to be missing."""
    theirs = definitions("stsac").keys()
    assert list(theirs) == [name for name in definitions("stddpg") if name != "as_tuple"]
    assert theirs - definitions("stac_ac").keys() == OFF_POLICY
    assert len(theirs - DIFFERENT) > 35
    assert len(theirs - DIFFERENT_IN["stac_ac"] - OFF_POLICY) > 18
    assert not is_part(["a", "+", "b"], ["a", "-", "b"])
    assert not is_part(["b", "a"], ["a", "b"])


@pytest.mark.parametrize("script", SCRIPTS[:2])
def test_the_maths_stands_together(script):
    """From the first loss to the update, in the paper's order; Gauss-Newton, which is not in the paper, after it."""
    names = list(definitions(script))
    order = (
        "actor_loss td_target critic_loss conjugate_gradient stackelberg_gradient player_gradients stackelberg_update "
        "gauss_newton_gradient gauss_newton_preconditioner training_loop"
    ).split()
    places = [names.index(name) for name in order]
    assert places == sorted(places)
    assert places[6] - places[0] < 20


@pytest.mark.parametrize("script", SCRIPTS)
def test_shares_nothing(script):
    _, tree = parse(script)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    ours = [path.stem for folder in (".", "tests", "benchmark") for path in ROOT.glob(f"{folder}/*.py")]
    assert not imported & set(ours)
    # under __main__ there is nothing but a call, so that everything can be imported
    last = tree.body[-1]
    assert isinstance(last, ast.If)
    assert [type(node) for node in last.body] == [ast.Expr]


@pytest.mark.parametrize("script", SCRIPTS)
def test_header_names_its_dependencies(script):
    """PEP 723: the header is valid TOML, and asks for what pyproject.toml asks for."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    text, tree = parse(script)
    block = re.match(r"# /// script\n((?:#(?: .*)?\n)+?)# ///\n", text).group(1)
    header = tomllib.loads("".join(line[2:] or "\n" for line in block.splitlines(keepends=True)))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert header["requires-python"] == project["requires-python"]
    assert set(header["dependencies"]) <= set(project["dependencies"])  # so that all run after `pip install -e .`
    # and every import comes from there, from the standard library, or is an extra that is imported when it is asked for
    names = {re.match(r"[\w-]+", line).group() for line in header["dependencies"]}
    top = {alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert top - set(sys.stdlib_module_names) <= names
