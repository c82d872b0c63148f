"""The toy game against the paper's numbers, autograd, stsac.py's Stackelberg gradient, and itself in other words."""

import inspect
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import stsac
import toy_game

ROOT = Path(__file__).parent.parent
POINTS = [(-1.0, 1.0), (-0.3, -0.8), (0.05, 0.4), (0.7, -0.1), (1.3, 0.9)]
SMALL = {"steps": 60, "sac_updates": 20, "sac_runs": 3, "noisy_steps": 50}
PNGS = ["figure1", "figure2", "figure4", "figure5", "figure6", "figure7", "theorem2"]


def tensor(x):
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


@pytest.fixture(scope="module")
def results():
    return toy_game.simulate_toy(toy_game.Args())


@pytest.mark.parametrize(
    "name, distances, sign_changes, largest, worst",
    [
        ("individual", ("0.224", "0.162", "0.0733"), 12, "0.745", "-0.0276"),
        ("Stackelberg", ("0.193", "0.0689", "0.0316"), 0, "-0.0271", "-0.00573"),
        ("regularized", ("0.106", "0.0691", "0.00778"), 1, "0.108", "-0.00233"),
    ],
)
def test_table_to_three_digits(results, name, distances, sign_changes, largest, worst):
    path = results[name][2]
    got = toy_game.summarize(path, toy_game.Args().reward_scale)
    assert path.shape == (50_000, 2) and list(got[0]) == [1_000, 10_000, 50_000]
    assert tuple(f"{d:.3g}" for d in got[0].values()) == distances
    assert (got[1], f"{got[2]:.3g}", f"{got[3]:.3g}") == (sign_changes, largest, worst)


@pytest.mark.parametrize("peak", [0.0, 0.5])
@pytest.mark.parametrize("theta, w", POINTS)
def test_derivatives_are_those_of_J_and_L(theta, w, peak):
    c, t, v = 0.2, tensor(theta), tensor(w)
    J, L = toy_game.J(t, v), toy_game.L(t, v, c, peak)
    grads_J = torch.autograd.grad(J, [t, v])
    (grad_w,) = torch.autograd.grad(L, v, create_graph=True)
    second = torch.autograd.grad(grad_w, [t, v])
    (grad_reward,) = torch.autograd.grad(toy_game.reward(t, c, peak), t)
    got = [
        *(toy_game.grad_theta_J(theta, w), toy_game.grad_w_J(theta, w), toy_game.grad_w_L(theta, w, c, peak)),
        *(toy_game.grad_wtheta_L(theta, w, c, peak), toy_game.hess_w_L(theta, w)),
        toy_game.grad_reward(theta, c, peak),
    ]
    np.testing.assert_allclose(got, [g.item() for g in (*grads_J, grad_w, *second, grad_reward)], rtol=1e-12)
    # the game of Section 3.2, written out
    assert J.item() == w * theta
    if peak == 0:
        assert L.item() == pytest.approx((w * theta + theta**2 / 5) ** 2, rel=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.04, 3.0])
@pytest.mark.parametrize("theta, w", POINTS)
def test_direction_is_minus_the_stackelberg_gradient_of_stsac(theta, w, lam):
    t, v = tensor(theta), tensor(w)
    f1, f2 = -toy_game.J(t, v), toy_game.L(t, v, 0.2)
    (g,), info = stsac.stackelberg_gradient(f1, f2, [t], [v], lam, cg_iters=10, cg_tol=1e-14)
    assert toy_game.stackelberg_direction(theta, w, lam, 0.2) == pytest.approx(-g.item(), rel=1e-12)
    assert info["implicit_norm"] > 1e-3 and not info["negative_curvature"]


def test_total_derivative_is_the_slope_of_the_leaders_objective_along_the_best_response():
    c, h = 0.2, 1e-6
    for peak, theta in ((0.0, -0.7), (0.0, 0.3), (0.5, 0.8)):
        along = [toy_game.J(t, toy_game.reward(t, c, peak) / t) for t in (theta - h, theta + h)]
        w = toy_game.reward(theta, c, peak) / theta
        assert toy_game.grad_w_L(theta, w, c, peak) == pytest.approx(0, abs=1e-15)
        slope = (along[1] - along[0]) / (2 * h)
        assert toy_game.stackelberg_direction(theta, w, 0.0, c, peak) == pytest.approx(slope, abs=1e-9)


def test_lambda_interpolates():
    """Proposition 2; and with λ = 0 the closed form -w - 3cθ, which extends ∇J to θ = 0."""
    for theta, w in POINTS:
        assert toy_game.stackelberg_direction(theta, w, math.inf, 0.2) == w
        assert toy_game.stackelberg_direction(theta, w, 1e9, 0.2) == pytest.approx(w, rel=1e-6)
        assert toy_game.stackelberg_direction(theta, w, 0.0, 0.2) == pytest.approx(-w - 0.6 * theta, rel=1e-12)
        small = toy_game.stackelberg_direction(theta, w, 1e-9, 0.2)
        assert small == pytest.approx(-w - 0.6 * theta, rel=1e-4)


def test_simulate_updates_both_players_at_the_same_point():
    lr_theta, lr_w, e_theta, e_w, lam, c = [0.1, 0.2], [0.3, 0.4], [0.01, -0.02], [0.03, 0.04], 0.04, 0.2
    path = toy_game.simulate(-1.0, 1.0, lr_theta, lr_w, e_theta, e_w, lam, c)
    assert path.shape == (3, 2) and tuple(path[0]) == (-1.0, 1.0)
    for k in range(2):
        theta, w = path[k]
        d_theta = toy_game.stackelberg_direction(theta, w, lam, c) + e_theta[k]  # (17)
        d_w = toy_game.grad_w_L(theta, w, c) + e_w[k]  # (18)
        np.testing.assert_allclose(path[k + 1], [theta + lr_theta[k] * d_theta, w - lr_w[k] * d_w], rtol=1e-14)


def test_kind_of_equilibrium(results):
    c, p = 0.2, 0.5
    eigenvalues = {
        (math.inf, 0.0): [0, 0],
        (0.0, 0.0): [-3 * c, 0],
        (0.04, 0.0): [0, 0],
        (0.0, p): [-2 * p**2, -2 * c],
    }
    for (lam, peak), expected in eigenvalues.items():
        got = np.sort_complex(np.linalg.eigvals(toy_game.jacobian(peak, 0.0, lam, c, peak)))
        np.testing.assert_allclose(got, expected, atol=1e-5)
    # (leader's, follower's) second-order conditions of Definition 1
    np.testing.assert_allclose(toy_game.second_order(0.0, 0.0, c), (2 * c, 0), atol=1e-8)
    np.testing.assert_allclose(toy_game.second_order(0.0, 0.04, c), (0, 0.04), atol=1e-8)
    np.testing.assert_allclose(toy_game.second_order(p, 0.0, c, p), (2 * c, 2 * p**2), atol=1e-8)
    # rotation at the last iterate: with the individual gradient and λ > 0, not with λ = 0
    rotates = {}
    for name, (_, lam, path) in results.items():
        rotates[name] = bool(np.iscomplex(np.linalg.eigvals(toy_game.jacobian(*path[-1], lam, c))).any())
    assert rotates == {"individual": True, "Stackelberg": False, "regularized": True}


def test_regularized_best_response_is_of_fourth_order():
    """-J along it is 2cθ⁴/(2θ² + λ), the reason why λ > 0 does not make (0, 0) satisfy Definition 1."""
    c, lam, theta = 0.2, 0.04, 0.3
    w = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    cost = toy_game.L(theta, w, c) + lam / 2 * w**2  # a quadratic in w: one Newton step
    (g,) = torch.autograd.grad(cost, w, create_graph=True)
    (h,) = torch.autograd.grad(g, w)
    best = -(g / h).item()
    assert -toy_game.J(theta, best) == pytest.approx(2 * c * theta**4 / (2 * theta**2 + lam), rel=1e-12)


def test_lyapunov_function_falls():
    """w² + cθ⁴ falls along the dynamics for every λ, so that (0, 0) attracts."""
    theta, w = np.random.default_rng(0).uniform(-1, 1, (2, 10_000))
    for lam in (0.0, 1e-4, 0.04, 1.0, math.inf):
        d_theta, d_w = toy_game.dynamics(theta, w, lam, 0.2)
        assert (2 * w * d_w + 4 * 0.2 * theta**3 * d_theta < 0).all()


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
        expected, _ = stsac.stackelberg_gradient(f1, f2, [mu, sigma], [w], lam, cg_iters=10, cg_tol=1e-14)
    expected = [-g.item() for g in (*expected, *torch.autograd.grad(f2, [w]))]
    got = toy_game.sac_directions(mu.item(), sigma.item(), w.item(), noise.numpy(), lam, c, eta)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize("lam", [0.0, math.inf])
def test_sampled_field_equals_a_loop(lam):
    args = toy_game.Args(samples=3)
    mu, w = toy_game.grid(n=4)
    noise = np.random.default_rng(0).standard_normal((3, 7, 4, 4))
    field = np.array(toy_game.sac_field(mu, w, noise, lam, args))
    for i, j in ((0, 0), (1, 3), (3, 2)):
        draws = [
            toy_game.sac_directions(mu[i, j], args.sigma0, w[i, j], noise[:, draw, i, j], lam, 1.0, args.eta)
            for draw in range(7)
        ]
        np.testing.assert_allclose(field[:, i, j], np.mean(draws, axis=0)[[0, 2]], rtol=1e-12)


def test_sampled_field_has_the_right_mean():
    """The individual gradients are unbiased: against quadrature, within five standard errors."""
    args, lam, mu, w, draws = toy_game.Args(), math.inf, np.array(0.4), np.array(-0.5), 20_000
    noise = np.random.default_rng(0).standard_normal((args.samples, draws))
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    a = np.tanh(mu + args.sigma0 * nodes)
    mean = lambda x: (weights * x).sum() / weights.sum()  # noqa: E731
    exact = mean(w * (1 - a**2) - 2 * args.eta * a), -mean(2 * a * (w * a + a**2))
    each = toy_game.sac_directions(mu, args.sigma0, w, noise, lam, args.sac_reward_scale, args.eta)
    for got, want, sample in zip(toy_game.sac_field(mu, w, noise, lam, args), exact, (each[0], each[2])):
        assert abs(got - want) < 5 * sample.std() / math.sqrt(draws)
        assert abs(want) > 20 * sample.std() / math.sqrt(draws)  # so that a wrong sign or factor would show


def test_sac_dynamics_come_close_and_stay():
    args, rng = toy_game.Args(), np.random.default_rng(1)
    noise = rng.standard_normal((args.sac_updates, args.samples, args.sac_runs))
    for lam in (math.inf, 0.0):
        path = toy_game.simulate_sac(args, noise, lam)
        distance = np.hypot(path[:, 0], path[:, 2])
        np.testing.assert_allclose(toy_game.error(path), distance**2, rtol=1e-12)  # of (μ, σ, w), without σ
        assert path.shape == (2_001, 3, 20)
        assert 300 < np.median((distance < 0.1).argmax(0)) < 700 and (distance < 0.1).any(0).all()
        assert distance[1_000:].max() < 0.2 and (path[:, 1] > 0).all()


def test_theorem_2_converges_in_every_run(tmp_path):
    args = toy_game.Args(output_dir=str(tmp_path), noisy_steps=20_000)
    distance = toy_game.theorem2(args)
    assert distance.shape == (20_000, 10)
    early, late = distance[100:200], distance[-2_000:]
    assert distance.max() < 0.2 and late.max() < 0.02 and np.median(late) < np.median(early) / 5
    # without noise what is left is the start, which is forgotten monotonically
    still = toy_game.theorem2(toy_game.Args(output_dir=str(tmp_path), noisy_steps=20_000, noise=0.0))
    assert still[-1].max() < 1e-3 and (np.diff(still[1_000:], axis=0) < 0).all()


def test_stop_is_the_same_as_in_stsac():
    assert inspect.getsource(toy_game.stop) == inspect.getsource(stsac.stop)


@pytest.mark.parametrize(
    "change",
    [
        *({"theta0": 0.0}, {"peak": 0.0}, {"lam": 0.0}, {"lam": math.nan}, {"theta_lr": -1.0}, {"seed": -1}),
        *({"steps": 0}, {"samples": 0}, {"w_decay": 0.5}, {"theta_decay": 1.1}, {"w_decay": 0.95}, {"w0": math.inf}),
    ],
)
def test_bad_input_is_one_line_and_code_2(change, capsys, tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(SystemExit) as e:
        toy_game.main(toy_game.Args(output_dir=str(folder), **change))
    out, err = capsys.readouterr()
    assert e.value.code == 2 and err.count("\n") == 1 and "error: " in err and not out and not folder.exists()


def test_runs_that_go_wrong_say_so_in_one_line(capsys, tmp_path):
    for run, change in (
        (toy_game.simulate_toy, {"theta_lr": 50.0, "w_lr": 50.0}),
        (toy_game.sac, {"sac_lr": 1e200}),
        (toy_game.simulate_toy, {"theta_lr": 1.0, "w0": -0.25, "reward_scale": 0.25}),  # the first step is to θ = 0
    ):
        with pytest.raises(SystemExit) as e, np.errstate(all="ignore"):
            run(toy_game.Args(**{**SMALL, "output_dir": str(tmp_path), **change}))
        assert e.value.code == 1 and capsys.readouterr().err.count("\n") == 1


def test_command_line_draws_all_figures(tmp_path):
    """As a user runs it, from another folder, where stsac.py cannot be imported."""
    script = tmp_path / "toy_game.py"
    script.write_bytes((ROOT / "toy_game.py").read_bytes())
    flags = [part for name, value in SMALL.items() for part in ("--" + name.replace("_", "-"), str(value))]
    line = [sys.executable, str(script), "--output-dir", "a/b", *flags]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
    assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == sorted(f"{name}.png" for name in PNGS)
    for name in PNGS:
        png = (tmp_path / f"a/b/{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) > 5_000
    for expected in ("√(θ²+w²)", "Definition 1", "released notebook", "Theorem 2"):
        assert expected in done.stdout


def test_the_same_seed_draws_the_same(tmp_path, capsys):
    outputs = []
    for seed in (3, 3, 4):
        toy_game.sac(toy_game.Args(output_dir=str(tmp_path), seed=seed, **SMALL))
        outputs.append((capsys.readouterr().out, (tmp_path / "figure2.png").read_bytes()))
    assert outputs[0] == outputs[1] and outputs[0][0] != outputs[2][0] and outputs[0][1] != outputs[2][1]
