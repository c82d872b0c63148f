"""The toy game against the paper's numbers, autograd, stsac.py's Stackelberg gradient, and itself in other words."""

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import stsac
import toy_game

ROOT = Path(__file__).parent.parent
C = 0.2  # c of the paper's reward
POINTS = [(-1.0, 1.0), (-0.3, -0.8), (0.05, 0.4), (0.7, -0.1), (1.3, 0.9)]
SMALL = {"steps": 60, "sac_updates": 20, "sac_runs": 3, "noisy_steps": 50}
TABLE = {  # the three dynamics, to three digits
    ("individual gradient", "0.224 / 0.162 / 0.0733", "12", "0.745", "-0.0276"),
    ("Stackelberg, λ = 0", "0.193 / 0.0689 / 0.0316", "0", "-0.0271", "-0.00574"),
    ("Stackelberg, λ = 0.04", "0.106 / 0.0691 / 0.00778", "1", "0.108", "-0.00233"),
}
FIGURES = ["figure1", "figure2", "figure4", "figure5", "figure6", "figure7", "theorem2"]


def tensor(x):
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


@pytest.fixture(scope="module")
def results():
    return toy_game.simulate_toy(toy_game.Args())


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """What a user gets who copies the file to another folder, where stsac.py cannot be imported, and runs it."""
    folder = tmp_path_factory.mktemp("user")
    script = folder / "toy_game.py"
    script.write_bytes((ROOT / "toy_game.py").read_bytes())
    line = [sys.executable, str(script), "--output-dir", "a/b"]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(line, cwd=folder, capture_output=True, timeout=120, env=env)
    return done.returncode, done.stdout.decode(), done.stderr.decode(), folder / "a/b"


def table_rows(text):
    """The rows of all Markdown tables of a text, as tuples of cells."""
    rows = []
    for line in text.replace("−", "-").splitlines():
        if line.startswith("|"):
            rows.append(tuple(cell.strip() for cell in line.strip("|").split("|")))
    return [row for row in rows if set(row[0]) != {"-"}]


# The tables


def test_table_of_known_iterates(capsys):
    """θ_k = -(-0.99)^k, w = 0: every number of the table can be told, and which iterates it counts."""
    theta = -((-0.99) ** np.arange(2_000))
    result = toy_game.Result("known", 0.0, toy_game.BLUE, "-", theta, np.zeros(2_000))
    toy_game.print_toy(toy_game.Args(steps=2_000), [result])
    header, row = table_rows(capsys.readouterr().out)
    assert header[1] == "√(θ²+w²) at iterate 1,000 / 2,000"
    assert row == ("known", f"{0.99**999:.3g} / {0.99**1_999:.3g}", "1999", "0.99", f"{-C * 0.99**2_000:.3g}")


def test_the_docs_hold_every_table(user):
    code, out, err, _ = user
    assert code == 0 and err == ""
    printed = table_rows(out)
    assert len(printed) == 4 + 4 + 3 + 7
    missing = set(printed) - set(table_rows((ROOT / "docs/toy_game.md").read_text(encoding="utf-8")))
    assert not missing and set(printed) >= TABLE
    for text in ("No λ makes (0, 0) a differential", "released notebook", "Theorem 2: R(θ) = -0.2(θ - 0.5)²"):
        assert text in out


# The game


@pytest.mark.parametrize("peak", [0.0, 0.5])
@pytest.mark.parametrize("theta, w", POINTS)
def test_derivatives_are_those_of_J_and_L(theta, w, peak):
    t, v = tensor(theta), tensor(w)
    J, L = toy_game.J(t, v), toy_game.L(t, v, C, peak)
    dJ_dtheta, dJ_dw = torch.autograd.grad(J, [t, v])
    (dL_dw,) = torch.autograd.grad(L, v, create_graph=True)
    dL_dwdtheta, dL_dw2 = torch.autograd.grad(dL_dw, [t, v])
    (dR_dtheta,) = torch.autograd.grad(toy_game.reward(t, C, peak), t)
    for got, expected in [
        (toy_game.grad_theta_J(theta, w), dJ_dtheta),
        (toy_game.grad_w_J(theta, w), dJ_dw),
        (toy_game.grad_w_L(theta, w, C, peak), dL_dw),
        (toy_game.grad_wtheta_L(theta, w, C, peak), dL_dwdtheta),
        (toy_game.hess_w_L(theta, w), dL_dw2),
        (toy_game.grad_reward(theta, C, peak), dR_dtheta),
    ]:
        assert got == pytest.approx(expected.item(), rel=1e-12)
    # the game of Section 3.2, written out
    assert J.item() == w * theta
    if peak == 0:
        assert L.item() == pytest.approx((w * theta + theta**2 / 5) ** 2, rel=1e-12)


@pytest.mark.parametrize("peak", [0.0, 0.5])
@pytest.mark.parametrize("lam", [0.0, 0.04, 3.0])
@pytest.mark.parametrize("theta, w", POINTS)
def test_direction_is_minus_the_stackelberg_gradient_of_stsac(theta, w, lam, peak):
    t, v = tensor(theta), tensor(w)
    f1, f2 = -toy_game.J(t, v), toy_game.L(t, v, C, peak)
    (g,), _ = stsac.stackelberg_gradient(f1, f2, [t], [v], lam=lam, cg_iters=10, cg_tol=1e-14)
    assert toy_game.stackelberg_direction(theta, w, lam, C, peak) == pytest.approx(-g.item(), rel=1e-12)


def test_ends_of_lambda():
    """Proposition 2; and with λ = 0 the closed form -w - 3cθ, which extends ∇J to θ = 0."""
    for theta, w in POINTS:
        for lam, rel in ((math.inf, 0), (1e9, 1e-6)):
            assert toy_game.stackelberg_direction(theta, w, lam, C) == pytest.approx(w, rel=rel)
        for lam, rel in ((0.0, 1e-12), (1e-9, 1e-4)):
            assert toy_game.stackelberg_direction(theta, w, lam, C) == pytest.approx(-w - 0.6 * theta, rel=rel)


# The equilibria: the formulas of second_order and of docs/toy_game.md


def leader_cost(theta, lam, peak):
    """-J along the best response to L + λ/2 w², which is a Newton step from w = 0, as L is a quadratic in w."""
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)
    f2 = toy_game.L(theta, w, C, peak) + lam / 2 * w**2
    (g,) = torch.autograd.grad(f2, w, create_graph=True)
    (h,) = torch.autograd.grad(g, w, create_graph=True)
    return -toy_game.J(theta, -g / h), h


def eigenvalues(theta, w, lam, peak=0.0):
    """Of the Jacobian of the dynamics, smallest real part first."""
    point = torch.tensor([theta, w], dtype=torch.float64)
    rows = torch.autograd.functional.jacobian(lambda x: toy_game.vector_field(x[0], x[1], lam, C, peak), point)
    return np.sort_complex(torch.linalg.eigvals(torch.stack(rows)).numpy())


@pytest.mark.parametrize("lam", [0.0, 0.04, 2.0])
@pytest.mark.parametrize("peak", [0.0, 0.5, -0.8])
def test_second_order_conditions(lam, peak):
    """Definition 1, by autograd; at θ = 0, where λ = 0 gives 0/0, by its limit."""
    cost, _ = leader_cost(tensor(0.3), lam, peak)
    assert cost.item() == pytest.approx(2 * C * 0.3**2 * (0.3 - peak) ** 2 / (2 * 0.3**2 + lam), rel=1e-12)
    theta = tensor(peak or 1e-7)
    _, follower = leader_cost(theta, lam, peak)
    leader = torch.autograd.functional.hessian(lambda t: leader_cost(t, lam, peak)[0], theta.detach())
    np.testing.assert_allclose(toy_game.second_order(lam, C, peak), [leader.item(), follower.item()], atol=1e-10)


def test_eigenvalues_at_the_equilibria():
    for lam in (0.0, 0.04, 2.0):
        for peak in (0.5, -0.8):
            leader, _ = toy_game.second_order(lam, C, peak)
            expected = sorted([-leader, -2 * peak**2])
            np.testing.assert_allclose(eigenvalues(peak, 0.0, lam, peak), expected, atol=1e-12)
    np.testing.assert_allclose(eigenvalues(0.5, 0.0, 0.0, 0.5), [-0.5, -0.4], atol=1e-12)
    np.testing.assert_allclose(eigenvalues(1e-7, 0.0, 0.0), [-0.6, 0], atol=1e-6)
    np.testing.assert_allclose(eigenvalues(0.0, 0.0, 0.04), [0, 0], atol=1e-12)
    np.testing.assert_allclose(eigenvalues(0.0, 0.0, math.inf), [0, 0], atol=1e-12)


def test_eigenvalues_at_the_last_iterates(results):
    """Rotation with the individual gradient and with λ > 0, none with λ = 0: the numbers of docs/toy_game.md."""
    docs = (ROOT / "docs/toy_game.md").read_text(encoding="utf-8").replace("−", "-")
    for result in results:
        low, high = eigenvalues(result.actor[-1], result.critic[-1], result.lam)
        rotates = result.lam != 0
        assert bool(high.imag) == rotates
        words = f"{high.real:.4f} ± {high.imag:.4f}i" if rotates else f"{low.real:.4f}, {high.real:.4f}"
        assert words in docs


def test_lyapunov_function_falls():
    """w² + cθ⁴ falls along the dynamics for every λ, so that (0, 0) attracts: the derivation of docs/toy_game.md."""
    theta, w = np.random.default_rng(0).uniform(-1, 1, (2, 10_000))
    for lam in (0.0, 1e-4, 0.04, 1.0, math.inf):
        d_theta, d_w = toy_game.vector_field(theta, w, lam, C)
        slope = 2 * w * d_w + 4 * C * theta**3 * d_theta
        s = 2 * theta**2 / (2 * theta**2 + lam)
        np.testing.assert_allclose(d_theta, w - s * (2 * w + 3 * C * theta), atol=1e-12)
        np.testing.assert_allclose(
            slope, -4 * theta**2 * (w**2 + 2 * s * C * theta * w + 3 * s * C**2 * theta**2), atol=1e-12
        )
        assert (slope < 0).all()


# The updates


def test_simulate_updates_both_players_at_the_same_point():
    """Also with several runs at once, each as if it were alone."""
    alpha_theta, alpha_w = [0.1, 0.2], [0.3, 0.4]
    noise_theta, noise_w = 0.1 * np.random.default_rng(0).standard_normal((2, 2, 3))
    starts = [-1.0, 0.5, 0.8], [1.0, -0.4, 0.2]
    theta, w = toy_game.simulate(*starts, alpha_theta, alpha_w, noise_theta, noise_w, lam=0.04, c=C, peak=0.1)
    np.testing.assert_array_equal([theta[0], w[0]], starts)
    assert theta.shape == w.shape == (3, 3)
    for run in range(3):
        for k in range(2):
            point = theta[k, run], w[k, run]
            step_theta = toy_game.stackelberg_direction(*point, 0.04, C, 0.1) + noise_theta[k, run]  # (17)
            step_w = -toy_game.grad_w_L(*point, C, 0.1) - noise_w[k, run]  # (18)
            expected = point[0] + alpha_theta[k] * step_theta, point[1] + alpha_w[k] * step_w
            assert (theta[k + 1, run], w[k + 1, run]) == pytest.approx(expected, rel=1e-13)


def test_the_critics_rate():
    """The first step, of which θ has its own."""
    for result in toy_game.simulate_toy(toy_game.Args(steps=2, w_lr=0.5)):
        assert result.critic[1] == pytest.approx(1 - 0.5 * toy_game.grad_w_L(-1.0, 1.0, C))
        step = 0.01 * toy_game.stackelberg_direction(-1.0, 1.0, result.lam, C)
        assert result.actor[1] == pytest.approx(-1 + step)


def test_squared_error():
    theta, w = np.array([1.0, 2.0]), np.array([3.0, -4.0])
    np.testing.assert_array_equal(toy_game.squared_error(theta, w), [10, 20])
    np.testing.assert_array_equal(toy_game.squared_error(theta, w, 2.0), [10, 16])


# The SAC version


@pytest.mark.parametrize("lam", [0.0, 0.04, math.inf])
def test_sac_directions_against_stsac(lam):
    """Policy, entropy and critic of one update, differentiated by autograd; the implicit term by stsac's solver."""
    c, eta, noise = 0.7, 0.2, torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mu, sigma, w = tensor(-0.6), tensor(0.8), tensor(0.9)
    u = mu + sigma * noise
    a = torch.tanh(u)
    log_pi = torch.distributions.Normal(mu, sigma).log_prob(u) - torch.log(1 - a**2)
    f1, f2 = -(w * a - eta * log_pi).mean(), ((w * a + c * a**2) ** 2).mean()
    if lam == math.inf:
        expected = torch.autograd.grad(f1, [mu, sigma], retain_graph=True)
    else:
        expected, _ = stsac.stackelberg_gradient(f1, f2, [mu, sigma], [w], lam=lam, cg_iters=10, cg_tol=1e-14)
    expected = [-g.item() for g in (*expected, *torch.autograd.grad(f2, [w]))]
    got = toy_game.sac_directions(mu.item(), sigma.item(), w.item(), noise.numpy(), lam, c, eta)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize("lam", [0.0, math.inf])
def test_arrows_equal_a_loop(lam):
    args = toy_game.Args(samples=3)
    mu, w = np.meshgrid(np.linspace(-1, 1, 4), np.linspace(-1, 1, 4))
    noise = np.random.default_rng(0).standard_normal((3, 7, 4, 4))
    arrows = np.array(toy_game.sac_vector_field(mu, w, noise, lam, args))
    for i, j in ((0, 0), (1, 3), (3, 2)):
        steps = []
        for draw in range(7):
            steps.append(toy_game.sac_directions(mu[i, j], 1.0, w[i, j], noise[:, draw, i, j], lam, 1.0, args.eta))
        np.testing.assert_allclose(arrows[:, i, j], np.mean(steps, axis=0)[[0, 2]], rtol=1e-12)


def test_simulate_sac_steps_every_parameter():
    args = toy_game.Args(sac_lr=0.1, sac_reward_scale=0.7, eta=0.3, theta0=-0.5, sigma0=0.8, w0=0.6)
    noise = np.random.default_rng(0).standard_normal((2, 3, 4))
    path = np.array(toy_game.simulate_sac(args, noise, 0.04))
    assert path.shape == (3, 3, 4)  # (μ, σ, w), updates + 1, runs
    np.testing.assert_array_equal(path[:, 0, 1], [-0.5, 0.8, 0.6])
    for k in range(2):
        step = np.array(toy_game.sac_directions(*path[:, k], noise[k], 0.04, 0.7, 0.3))
        np.testing.assert_allclose(path[:, k + 1], path[:, k] + 0.1 * step, rtol=1e-14)


def test_columns_of_known_sac_runs():
    """Two runs that come near at update 2, and one that never does."""
    near, far = [[1.0], [1.0], [0.0], [0.05], [0.3]], np.ones((5, 1))
    mu = np.hstack([near, near, far])
    columns = toy_game.sac_columns(mu, np.arange(15.0).reshape(5, 3), np.zeros((5, 3)))
    assert columns == ("2 (2 to inf)", "0.3", "1", "13")


def test_the_same_seed_draws_the_same(tmp_path, capsys):
    outputs = []
    for seed in (3, 3, 4):
        toy_game.sac(toy_game.Args(output_dir=str(tmp_path), seed=seed, **SMALL))
        outputs.append((capsys.readouterr().out, (tmp_path / "figure2.png").read_bytes()))
    assert outputs[0] == outputs[1] and outputs[0][0] != outputs[2][0] and outputs[0][1] != outputs[2][1]


# Theorem 2


def test_step_sizes_of_assumption_1():
    alpha_theta, alpha_w = toy_game.step_sizes(toy_game.Args(noisy_steps=1_001))
    assert alpha_theta.shape == alpha_w.shape == (1_000,)
    np.testing.assert_allclose(alpha_theta[[0, 990]], [10**-0.9, 1_000**-0.9])
    np.testing.assert_allclose(alpha_w[[0, 990]], [10**-0.6, 1_000**-0.6])


def test_theorem_2_converges_in_every_run():
    args = toy_game.Args(noisy_steps=20_000)
    theta, w = toy_game.simulate_theorem2(args)
    distance = np.hypot(theta - args.peak, w)
    assert distance.shape == (20_000, 10) and distance.max() < 0.2 and distance[-2_000:].max() < 0.02
    np.testing.assert_allclose(distance[0], 0.2 * args.peak)
    # without noise what is left is the start, which is forgotten monotonically
    theta, w = toy_game.simulate_theorem2(toy_game.Args(noisy_steps=20_000, noise=0.0))
    still = np.hypot(theta - args.peak, w)
    assert still[-1].max() < 1e-3 and (np.diff(still[1_000:], axis=0) < 0).all()


def test_noise_has_its_standard_deviation_in_every_run():
    """One update from known points: what is not the gradient is noise."""
    args = toy_game.Args(noisy_steps=2, noise=0.3)
    theta, w = toy_game.simulate_theorem2(args, runs=4_000)
    grad_J = toy_game.stackelberg_direction(theta[0], w[0], 0.0, C, args.peak)
    grad_L = toy_game.grad_w_L(theta[0], w[0], C, args.peak)
    noise_theta = (theta[1] - theta[0]) / 10**-0.9 - grad_J
    noise_w = (w[0] - w[1]) / 10**-0.6 - grad_L
    np.testing.assert_allclose([noise_theta.std(), noise_w.std()], 0.3, rtol=0.05)
    assert abs(np.corrcoef(noise_theta, noise_w)[0, 1]) < 0.08


# Figures


def test_all_figures_are_written(user):
    folder = user[-1]
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.png" for name in FIGURES]
    for path in folder.iterdir():
        png = path.read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) > 5_000
        # the docs show figures of this size
        assert (ROOT / "docs/toy_game" / path.name).read_bytes()[16:24] == png[16:24]


def test_what_figures_show(results, monkeypatch):
    figures = {}
    monkeypatch.setattr(toy_game, "save_figure", lambda figure, args, name: figures.update({name: figure}))
    args = toy_game.Args(**{**SMALL, "steps": 50_000, "peak": 0.8})
    toy_game.draw_toy(args, results)
    toy_game.sac(args)
    toy_game.theorem2(args)
    titles = {name: [ax.get_title() for ax in figure.axes] for name, figure in figures.items()}
    dynamics = ["individual gradient", "Stackelberg, λ = 0", "Stackelberg, λ = 0.04"]
    planes = [f"({letter}) {label}" for letter, label in zip("abc", dynamics)]
    assert titles == {
        "figure1": [*planes[:2], "(c) error"],
        "figure2": ["(a) SAC", "(b) STSAC-AL, λ = 0"],
        "figure4": planes,
        "figure5": ["(a) error", "(b) return"],
        "figure6": ["(a) SAC", "(b) STSAC-AL, λ = 0"],
        "figure7": ["(a) error", "(b) return"],
        "theorem2": ["(a) noisy iterates", "(b) error"],
    }
    theta, w = toy_game.grid()
    assert (theta != 0).all()
    for ax, result in zip(figures["figure4"].axes, results):
        d_theta, d_w = toy_game.vector_field(theta, w, result.lam, C)
        (arrows,) = ax.collections
        np.testing.assert_allclose(np.arctan2(arrows.V, arrows.U), np.arctan2(d_w, d_theta).ravel(), atol=1e-12)
        np.testing.assert_allclose(np.hypot(arrows.U, arrows.V), 1)
        np.testing.assert_array_equal(ax.lines[0].get_xydata(), np.stack([result.actor, result.critic], axis=1))
    errors, returns = figures["figure5"].axes
    for curve, return_curve, result in zip(errors.lines, returns.lines, results):
        iterate, error = curve.get_xydata().T
        k = iterate.astype(int) - 1
        assert (k[0], k[-1]) == (0, 49_999) and curve.get_label() == result.label
        np.testing.assert_allclose(error, result.actor[k] ** 2 + result.critic[k] ** 2)
        np.testing.assert_allclose(return_curve.get_ydata(), -C * result.actor[k] ** 2)
    variance = figures["theorem2"].axes[1].lines[-1]
    iterate, values = variance.get_xydata().T
    assert variance.get_label() == "variance of w from its noise" and (iterate[0], iterate[-1]) == (2, 50)
    np.testing.assert_allclose(values, args.noise**2 * (iterate + 8) ** -0.6 / (4 * args.peak**2))  # ∇_w²L = 2 p²
    # one run in Figure 2, all in Figure 6; beside them the start and the equilibrium
    assert [len(figures[name].axes[0].lines) - 2 for name in ("figure2", "figure6")] == [1, args.sac_runs]
    one, first = (figures[name].axes[0].lines[0].get_xydata() for name in ("figure2", "figure6"))
    np.testing.assert_array_equal(one, first)
    errors, returns = figures["figure7"].axes  # they begin at (-1, 1)
    assert errors.lines[0].get_ydata()[0] == 2
    assert returns.lines[0].get_ydata()[0] == pytest.approx(-args.sac_reward_scale * np.tanh(-1) ** 2)
    # Theorem 2: the arrows are those around its own equilibrium, and curves have the quartiles as their bands
    (arrows,) = figures["theorem2"].axes[0].collections
    d_theta, d_w = toy_game.vector_field(*toy_game.grid(0.8, 0.45 * 0.8), 0.0, C, 0.8)
    np.testing.assert_allclose(np.arctan2(arrows.V, arrows.U), np.arctan2(d_w, d_theta).ravel(), atol=1e-12)
    ax = Figure().subplots()
    toy_game.draw_curves(ax, "", "", "linear", results[:1], [np.arange(5.0)[None]])
    assert ax.lines[0].get_ydata()[0] == 2 and {*ax.collections[0].get_paths()[0].vertices[:, 1]} == {1, 3}


# The command line


@pytest.mark.parametrize(
    "flag, value",
    [
        *[("--theta0", "0"), ("--peak", "0"), ("--lam", "0"), ("--steps", "0"), ("--samples", "0"), ("--sigma0", "0")],
        *[("--lam", "nan"), ("--lam", "inf"), ("--w0", "-inf"), ("--eta", "nan"), ("--sac-lr", "1e300")],
        *[("--theta-lr", "-1"), ("--eta", "-0.1"), ("--noise", "-1"), ("--reward-scale", "-0.2"), ("--sac-runs", "-2")],
        *[("--seed", "-1"), ("--seed", "2147483648"), ("--seed", "9" * 30), ("--noisy-steps", "1" + "0" * 400)],
        *[("--w-decay", "0.5"), ("--theta-decay", "1.1"), ("--w-decay", "0.95"), ("--theta-decay", "0.55")],
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_made(flag, value, capsys, tmp_path, monkeypatch):
    folder = tmp_path / "new"
    monkeypatch.setattr(sys, "argv", ["toy_game.py", "--output-dir", str(folder), f"{flag}={value}"])
    with pytest.raises(SystemExit) as e:
        toy_game.main()
    message = e.value.code  # a text, which Python prints on stderr before it ends with code 1
    assert message.startswith("toy_game.py: error: ") and flag in message and "\n" not in message
    assert capsys.readouterr() == ("", "") and not folder.exists()


def test_edge_values_are_accepted():
    toy_game.check_args(toy_game.Args(seed=0, w0=0.0, eta=0.0, noise=0.0, steps=1, theta_decay=1.0))
    toy_game.check_args(toy_game.Args(seed=2**31 - 1, theta0=-2.0, w0=-1.0, peak=-0.5))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/folder"):
        monkeypatch.setattr(sys, "argv", ["toy_game.py", "--output-dir", str(tmp_path / folder)])
        with pytest.raises(SystemExit) as e:
            toy_game.main()
        assert e.value.code.startswith("toy_game.py: error: --output-dir: ") and "\n" not in e.value.code


def test_runs_that_go_wrong_say_so_in_one_line(capsys):
    for run, change in (
        (toy_game.simulate_toy, {"theta_lr": 50.0, "w_lr": 50.0}),
        (toy_game.sac, {"sac_lr": 1e200}),
        (toy_game.simulate_theorem2, {"noise": 1e200}),
        (toy_game.simulate_toy, {"theta_lr": 1.0, "w0": -0.25, "reward_scale": 0.25}),  # the first step is to θ = 0
    ):
        with pytest.raises(SystemExit) as e, np.errstate(all="ignore"):
            run(toy_game.Args(**{**SMALL, **change}))
        assert e.value.code.startswith("toy_game.py: error: with λ = ") and "\n" not in e.value.code


def test_a_run_that_goes_wrong_at_the_command_line(tmp_path):
    """With a terminal that knows ASCII alone, too: one line, without numpy's warnings and without a traceback."""
    line = [sys.executable, str(ROOT / "toy_game.py"), "--theta-lr", "50", "--w-lr", "50", "--steps", "60"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, timeout=120, env=env)
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.startswith(b"toy_game.py: error: with ? = inf") and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_help_says_what_the_comments_say(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "argv", ["toy_game.py", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as e:
        toy_game.main()
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    assert not e.value.code and "--sac-reward-scale FLOAT" in text
    assert ("θ_0, where the actor starts" if encoding == "utf-8" else "?_0, where the actor starts") in text
