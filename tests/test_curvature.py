"""The actor as leader: the Jacobian in factors, Gauss-Newton, preconditioner, networks and losses that were changed."""

import copy
import importlib
import inspect
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_gradient
import torch
import torch.nn as nn
import torch.nn.functional as F
from gymnasium.spaces import Box
from test_gradient import GAMMA, dense, positive_definite_lam, vector
from test_solver import spd
from test_training import args as small_args
from test_training import assert_same_weights, command, finish, flags, weights

import stddpg
import stsac

LAYOUTS = [(), (8,), (8, 8), (16, 8, 4)]
NOISE = 3  # seed of the one sample that all costs are taken on


@pytest.fixture(params=[stsac, stddpg], ids=lambda script: script.__name__)
def script(request):
    return request.param


class Game(test_gradient.Game):
    """Both costs on one stream of noise, drawn in the order in which `player_gradients` draws it."""

    def __init__(self, *arguments, **changes):
        super().__init__(*arguments, **changes)
        self.batch.terminated[0] = 0  # also in a batch of one the target depends on θ

    def forward(self, player):
        torch.manual_seed(NOISE)
        f_actor = self.script.actor_loss(self.actor, self.critic, self.batch, *self.entropy)
        nets = self.actor, self.critic, self.target_critic
        f_critic = self.script.critic_loss(*nets, self.batch, GAMMA, *self.entropy)
        return f_actor if player == "actor" else f_critic

    @property
    def qs(self):
        return [self.critic.q1, self.critic.q2] if self.script is stsac else [self.critic.q1]

    @property
    def x(self):
        return torch.cat([self.batch.obs, self.batch.actions], dim=-1)

    def y(self):
        """The targets on the same noise."""
        torch.manual_seed(NOISE)
        self.actor(self.batch.obs)
        nets = self.actor, self.target_critic
        return self.script.td_target(*nets, self.batch, GAMMA, *self.entropy).detach()

    def fit(self, noise=0.0):
        """Moves the last layer of each critic so that it fits the targets exactly, then the targets by `noise`."""
        for q in self.qs:
            with torch.no_grad():
                features = torch.cat([q[:-1](self.x), torch.ones(len(self.x), 1).double()], dim=1)
                change = torch.linalg.lstsq(features, (self.y() - q(self.x)[:, 0])[:, None], driver="gelsd").solution
                q[-1].weight += change[:-1].T
                q[-1].bias += change[-1]
                assert (q(self.x)[:, 0] - self.y()).abs().max() < 1e-11
        self.shift_targets(noise)
        return self

    def shift_targets(self, size):
        noise = torch.randn(len(self.x), generator=torch.Generator().manual_seed(5)).double()
        self.batch = self.batch._replace(rewards=self.batch.rewards + size * noise)
        return self

    def gradients(self, current_lam, **changes):
        """`player_gradients`, with the actor as leader where nothing else is said."""
        args = self.script.Args(gamma=GAMMA, **{"leader": "actor", "cg_iters": 1000, "cg_tol": 1e-13, **changes})
        torch.manual_seed(NOISE)
        target_actor = () if self.script is stsac else (self.actor,)
        nets = self.actor, self.critic, *target_actor, self.target_critic
        return self.script.player_gradients(*nets, self.batch, *self.entropy, current_lam, args)


def jacobian(q, x):
    """∂Q/∂w, [B, n], row by row through autograd."""
    params = list(q.parameters())
    return torch.stack([vector(torch.autograd.grad(out, params, retain_graph=True)) for out in q(x)[:, 0]])


def gauss_newton(game):
    """The explicit Gauss-Newton matrix of L, one block for each critic."""
    Js = [jacobian(q, game.x) for q in game.qs]
    return torch.block_diag(*(2 / len(J) * J.T @ J for J in Js))


def critic_hessian(game):
    """The explicit ∇_w²L."""
    cost, theta = game.as_function("critic"), vector(game.theta)
    return torch.autograd.functional.hessian(lambda w: cost(theta, w), vector(game.w))


def eye_like(A):
    return torch.eye(len(A), dtype=A.dtype)


def record(monkeypatch, script, name):
    """Lists the calls of a function of the script: its arguments and what it returned."""
    calls, original = [], getattr(script, name)

    def recording(*arguments):
        result = original(*arguments)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(script, name, recording)
    return calls


def relative_error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


class TestFactors:
    @pytest.fixture(params=[(hidden, size) for hidden in LAYOUTS for size in (1, 7)], ids=str)
    def game(self, script, request):
        hidden, batch_size = request.param
        return Game(script, hidden, batch_size)

    def test_equal_the_explicit_jacobian(self, script, game):
        """A wrong derivative, layer order, transpose or forgotten bias in the factors or in what is made of them."""
        other = torch.randn(5, game.x.shape[1]).double()
        for q in game.qs:
            dense_J, dense_other = jacobian(q, game.x), jacobian(q, other)
            out, J = script.jacobian_factors(q, game.x)
            _, J_other = script.jacobian_factors(q, other)
            c = torch.randn(len(out)).double()
            close = {"rtol": 1e-12, "atol": 1e-12}
            torch.testing.assert_close(out.detach(), q(game.x)[:, 0].detach(), **close)
            product = script.vjp(J, c)
            assert [t.shape for t in product] == [p.shape for p in q.parameters()]
            torch.testing.assert_close(vector(product), dense_J.T @ c, **close)
            torch.testing.assert_close(script.tangent_kernel(J, J), dense_J @ dense_J.T, **close)
            torch.testing.assert_close(script.tangent_kernel(J, J_other), dense_J @ dense_other.T, **close)
            assert not any(t.requires_grad for pair in J for t in pair)

    def test_value_has_the_slope_in_the_inputs_alone(self, script, game):
        """∂Q/∂a for the actor's gradient, and nothing that reaches w."""
        x = game.x.clone().requires_grad_()
        for q in game.qs:
            out, _ = script.jacobian_factors(q, x)
            (slope,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
            torch.testing.assert_close(slope, torch.autograd.grad(q(x).sum(), x)[0])
            assert torch.autograd.grad(out.sum(), list(q.parameters()), allow_unused=True) == (None,) * len(
                list(q.parameters())
            )

    def test_ridge_solver(self, script):
        """(K + damping)⁻¹, of a number and of one a sample; K stays as it is."""
        K, c = spd(10, 1e3), torch.randn(10).double()
        for lam in (1e-3, 1.0, 1e4):
            expected = torch.linalg.solve(K + lam * eye_like(K), c)
            torch.testing.assert_close(script.ridge_solver(K, lam)(c), expected, rtol=1e-10, atol=1e-12)
            each = lam * torch.arange(1.0, 11.0).double()
            expected = torch.linalg.solve(K + each.diag(), c)
            torch.testing.assert_close(script.ridge_solver(K, each)(c), expected, rtol=1e-10, atol=1e-12)


# parameters of one critic: 59, 59, 59, 29, 6, of which the last two are fewer than the samples
SHAPES = [((5, 4), 12), ((5, 4), 1), ((5, 4), 40), ((4,), 64), ((), 20)]


class TestGaussNewton:
    @pytest.mark.parametrize("lam", [1e-3, 1.0, 500.0, 1e4])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_equals_the_dense_formula(self, script, shape, lam):
        """The leader's gradient with (H_GN + λI)⁻¹ built explicitly, of both critics as one block each."""
        game = Game(script, *shape, seed=1)
        direct, grad2_f1, mixed, _ = dense(game, "actor")
        H = gauss_newton(game)
        implicit = -mixed.T @ torch.linalg.solve(H + lam * eye_like(H), grad2_f1)
        *_, grad_theta, _, info = game.gradients(lam, curvature="gauss-newton")
        # κ · eps = 1e5 · 2e-16 at λ = 1e-3
        assert (vector(grad_theta) - (direct + implicit)).norm() < 1e-8 * implicit.norm()
        torch.testing.assert_close(info["direct_norm"], direct.norm())
        torch.testing.assert_close(info["implicit_norm"], implicit.norm())
        torch.testing.assert_close(info["cosine"], torch.cosine_similarity(direct, implicit, dim=0))
        assert info.keys() == {"direct_norm", "implicit_norm", "cosine"}  # there is no solver to report on

    @pytest.mark.parametrize("control", [False, True], ids=["", "benchmark/stsac_mean.py"])
    def test_each_critic_has_its_own_block(self, control, monkeypatch):
        """∇_wJ reaches only the arg-min critic: with one that is never smaller, the other alone has a term. The control
        has the mean of its df1/dy."""
        if control:
            monkeypatch.syspath_prepend(Path(stsac.__file__).parent / "benchmark")
            mean_ridge_solver = importlib.import_module("stsac_mean").mean_ridge_solver
            monkeypatch.setattr(stsac, "ridge_solver", mean_ridge_solver)
        game = Game(stsac)
        game.critic.q2[-1].bias.data += 1e3  # never the smaller one
        torch.manual_seed(NOISE)
        actions, _ = game.actor(game.batch.obs)
        J = jacobian(game.critic.q1, game.x)
        J_pi = jacobian(game.critic.q1, torch.cat([game.batch.obs, actions.detach()], dim=-1))
        df1_dy = torch.linalg.solve(J @ J.T + 6 * torch.eye(12).double(), -J_pi.mean(0) @ J.T)
        df1_dy = df1_dy.mean().expand(12) if control else df1_dy
        y = stsac.td_target(game.actor, game.target_critic, game.batch, GAMMA, *game.entropy)
        expected = vector(torch.autograd.grad(df1_dy @ y, game.theta))
        torch.manual_seed(NOISE)
        direct = vector(torch.autograd.grad(game("actor"), game.theta))
        *_, grad_theta, _, _ = game.gradients(1.0, curvature="gauss-newton")
        assert relative_error(vector(grad_theta) - direct, expected) < 1e-10

    @pytest.mark.parametrize("lam", [1e-2, 10.0])
    def test_is_exact_where_the_residual_is_zero(self, script, lam):
        """Where the critics fit their targets the Hessian is its Gauss-Newton part, so this is the total derivative."""
        game = Game(script, (8, 8), 6).fit()
        direct, grad2_f1, mixed, hessian = dense(game, "actor")
        assert relative_error(gauss_newton(game), hessian) < 1e-11
        implicit = -mixed.T @ torch.linalg.solve(hessian + lam * eye_like(hessian), grad2_f1)
        for curvature in ("gauss-newton", "hessian"):
            *_, grad_theta, _, info = game.gradients(lam, curvature=curvature)
            assert (vector(grad_theta) - (direct + implicit)).norm() < 1e-8 * implicit.norm()
        assert info["iterations"] <= 2  # the preconditioner is then the inverse, to rounding

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("lam", [0.02, 1e-30])
    def test_singular_kernel(self, script, lam, dtype):
        """A batch with repetitions has a singular K: without a floor under λ rounding would make it indefinite."""
        game = Game(script, (8, 8), 12).to(dtype)
        index = torch.arange(12) // 4
        game.batch = script.Batch(*(1e3 * column[index].to(dtype) for column in game.batch))
        *_, grad_theta, _, _ = game.gradients(lam, curvature="gauss-newton")
        assert vector(grad_theta).isfinite().all()


class TestFullHessian:
    @pytest.mark.parametrize("precondition", [True, False])
    @pytest.mark.parametrize("seed", range(3))
    def test_equals_the_dense_formula(self, script, seed, precondition):
        """The total derivative with all of ∇_w²L; without its residual part this would be Gauss-Newton."""
        game = Game(script, seed=seed)
        direct, grad2_f1, mixed, hessian = dense(game, "actor")
        lam = positive_definite_lam(hessian)
        A = hessian + lam * eye_like(hessian)
        assert torch.linalg.eigvalsh(A)[0] > 0
        implicit = -mixed.T @ torch.linalg.solve(A, grad2_f1)
        *_, grad_theta, _, info = game.gradients(lam, precondition=precondition)
        assert (vector(grad_theta) - (direct + implicit)).norm() < 1e-8 * implicit.norm()
        assert info["residual"] < 1e-13 and not info["negative_curvature"]
        H = gauss_newton(game)
        wrong = -mixed.T @ torch.linalg.solve(H + lam * eye_like(H), grad2_f1)
        assert relative_error(wrong, implicit) > 1e-3  # the residual part matters here

    @pytest.mark.parametrize("seed", range(5))
    def test_preconditioner_saves_products(self, script, seed):
        """Small residuals, a large spread of curvature: the relative residual is 1e-3 after at most three products."""
        game = Game(script, (6, 20), 6, seed=seed).fit(noise=1e-4)
        hessian = critic_hessian(game)
        eigenvalues = torch.linalg.eigvalsh(hessian)
        lam = float(1e-4 * eigenvalues[-1])
        assert eigenvalues[0] + lam > 0
        counts = {}
        for precondition in (True, False):
            *_, info = game.gradients(lam, precondition=precondition, cg_tol=1e-3)
            counts[precondition] = info["iterations"]
            assert info["residual"] <= 1e-3 and not info["negative_curvature"]
        assert counts[True] <= 3 < counts[False]

    def test_critics_of_unequal_sizes(self, monkeypatch):
        """Each Q network has its own part of w."""
        mlp, widths = stsac.mlp, iter([(5, 4), (6,)])
        game = Game(stsac)
        spaces = 5, 1
        game.critic.q1, game.critic.q2 = (mlp(spaces[0], *hidden, spaces[1]).double() for hidden in widths)
        game.w = list(game.critic.parameters())
        direct, grad2_f1, mixed, hessian = dense(game, "actor")
        lam = positive_definite_lam(hessian)
        implicit = -mixed.T @ torch.linalg.solve(hessian + lam * eye_like(hessian), grad2_f1)
        for precondition in (True, False):
            *_, grad_theta, _, _ = game.gradients(lam, precondition=precondition)
            assert (vector(grad_theta) - (direct + implicit)).norm() < 1e-8 * implicit.norm()

    def test_preconditioner_is_the_gauss_newton_solve(self, script, monkeypatch):
        """M r = (H_GN + λI)⁻¹ r; another scale would only show where Mb is fallen back to."""
        game = Game(script)
        calls = record(monkeypatch, script, "conjugate_gradient")
        game.gradients(0.3, cg_iters=1)
        preconditioner = calls[0][0][4]
        H = gauss_newton(game)
        r = torch.randn(len(H)).double()
        assert relative_error(preconditioner(r), torch.linalg.solve(H + 0.3 * eye_like(H), r)) < 1e-11

    @pytest.mark.parametrize("lam", [1e-2, 1.0])
    def test_indefinite_is_no_worse_than_gauss_newton(self, script, lam, monkeypatch):
        """Large residuals: finite, said so, and by model and residual no worse than the Gauss-Newton solution.

        Both are of Av = b. If already the first product shows negative curvature, it is the Gauss-Newton solution.
        """
        solves = record(monkeypatch, script, "conjugate_gradient")
        first = []
        for seed in range(15):
            game = Game(script, (4, 3), 8, seed=seed).shift_targets((3.0, 30.0, 300.0)[seed % 3])
            _, b, _, hessian = dense(game, "actor")
            A = hessian + lam * eye_like(hessian)
            assert torch.linalg.eigvalsh(A)[0] < -1e-3
            H = gauss_newton(game)
            v_gn = torch.linalg.solve(H + lam * eye_like(H), b)
            *_, grad_theta, _, info = game.gradients(lam)
            v = solves[-1][1][0]
            assert v.isfinite().all() and vector(grad_theta).isfinite().all() and info["negative_curvature"]

            def model(v, A=A, b=b):
                return v @ A @ v / 2 - b @ v

            residual = (b - A @ v).norm() / b.norm()
            assert model(v) <= model(v_gn) + 1e-10 * abs(model(v_gn))
            assert residual <= (b - A @ v_gn).norm() / b.norm() * (1 + 1e-10)
            torch.testing.assert_close(info["residual"], residual, rtol=1e-7, atol=1e-10)
            first.append(bool(v_gn @ A @ v_gn <= 0))
            if first[-1]:
                assert info["iterations"] == 0
                assert relative_error(v, v_gn) < 1e-9
        assert any(first) and not all(first)


class TestPlayers:
    @pytest.mark.parametrize("precondition", [True, False])
    @pytest.mark.parametrize("hidden", [(), (5, 4)], ids=str)
    def test_equals_stackelberg_gradient(self, script, hidden, precondition):
        """All of `player_gradients` against `stackelberg_gradient` of f1 = -J and f2 = L, and against autograd."""
        game = Game(script, hidden, seed=2)
        game.target_critic.requires_grad_(True)
        lam = positive_definite_lam(dense(game, "actor")[3])
        expected, expected_info = game.stackelberg_gradient("actor", lam)
        f_actor, f_critic, grad_theta, grad_w, info = game.gradients(lam, precondition=precondition)
        assert [t.shape for t in grad_theta] == [p.shape for p in game.theta]
        assert [t.shape for t in grad_w] == [p.shape for p in game.w]
        assert relative_error(vector(grad_theta), vector(expected)) < 1e-9
        for name in ("direct_norm", "implicit_norm", "cosine"):
            torch.testing.assert_close(info[name], expected_info[name])
        assert info.keys() == expected_info.keys()
        torch.testing.assert_close(f_actor, game("actor").detach())
        torch.testing.assert_close(f_critic, game("critic").detach())
        torch.testing.assert_close(vector(grad_w), vector(torch.autograd.grad(game("critic"), game.w)))
        # nothing is left that a later backward could reach, and no .grad, of the target critic least of all
        returned = [f_actor, f_critic, *grad_theta, *grad_w, *info.values()]
        assert not any(t.requires_grad for t in returned)
        assert all(p.grad is None for p in game.parameters())

    def test_moves_the_targets(self, script):
        """Σ_i df1/dy_i ∇_θ y_i is not small, so the tests above are about something."""
        *_, info = Game(script, seed=2).gradients(1.0, curvature="gauss-newton")
        assert info["implicit_norm"] > 1e-2 * info["direct_norm"]

    @pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
    def test_large_lam_is_leader_none(self, script, curvature):
        """Proposition 2, of everything that is returned."""
        game = Game(script, seed=2)
        plain = game.gradients(1.0, leader="none")
        for lam in (1e30, math.inf):
            for a, b in zip(game.gradients(lam, curvature=curvature)[:4], plain[:4]):
                torch.testing.assert_close(a, b)

    def test_gauss_newton_is_not_the_hessian(self, script, monkeypatch):
        """Each curvature takes its own way, and only with the actor as leader."""
        game = Game(script)
        calls = record(monkeypatch, script, "gauss_newton_gradients")
        for leader in ("actor", "critic", "none"):
            game.gradients(5.0, leader=leader)
            assert not calls
            game.gradients(5.0, leader=leader, curvature="gauss-newton")
            assert len(calls) == (leader == "actor")
            calls.clear()


class TestSingle:
    """At the scale of Hopper (two layers of 256, batch 100, values in the thousands), in float32 against float64."""

    SPACES = Box(-1.0, 1.0, (11,)), Box(-1.0, 1.0, (3,))

    @pytest.fixture
    def leads(self, script, monkeypatch):
        """(lam, **flags) -> the leader's gradient and info in float32, the same in float64, and κ."""
        torch.manual_seed(0)
        kinds = (script.Actor, script.Critic, script.Critic)
        actor, critic, target_critic = nets = [net(*self.SPACES) for net in kinds]
        B, noise = 100, torch.randn(2, 100, 3)
        for p in [*critic.parameters(), *target_critic.parameters()]:
            p.data *= 9
        qs = [q for c in (critic, target_critic) for q in c.children()]
        for q in qs:
            q[-1].bias.data += 3000
        batch = script.Batch(*(torch.randn(B, *shape) for shape in ((11,), (3,), (), (11,), ())))
        batch = batch._replace(
            obs=3 * batch.obs, next_obs=3 * batch.next_obs, terminated=(batch.terminated > 2).float()
        )
        batch = batch._replace(actions=batch.actions.clamp(-1, 1))
        wide, wide_batch = [copy.deepcopy(net).double() for net in nets], script.Batch(*(t.double() for t in batch))
        x = torch.cat([wide_batch.obs, wide_batch.actions], dim=-1)
        largest = 0.0
        for q in wide[1].children():
            out, J = script.jacobian_factors(q, x)
            largest = max(largest, float(2 / B * torch.linalg.eigvalsh(script.tangent_kernel(J, J))[-1]))
            assert out.abs().mean() > 1e3
        assert 3e5 < largest < 3e6  # of the Gauss-Newton part; DESIGN: Hopper's H has 4e5 to 1.3e6
        extra = (0.2,) if script is stsac else ()

        def leads(lam, **flags):
            results = []
            for (actor, critic, target_critic), data in ((nets, batch), (wide, wide_batch)):
                drawn = iter(noise)
                monkeypatch.setattr(torch, "randn_like", lambda t, drawn=drawn: next(drawn).to(t.dtype))
                target_actor = () if script is stsac else (actor,)
                all_nets = actor, critic, *target_actor, target_critic
                *_, grad_theta, _, info = script.player_gradients(*all_nets, data, *extra, lam, script.Args(**flags))
                results.append((vector(grad_theta), info))
            return *results, largest / lam

        return leads

    def test_gauss_newton(self, leads):
        """K has rounding errors of eps · λ_max, so (K + λB/2)⁻¹ has relative ones of at most κ · eps times a few.

        κ = λ_max/λ ≈ 1.1e3 and eps = 1.2e-7: κ · eps = 1.4e-4, and the forward pass through sums of 256 adds a factor
        of at most √256. Measured: 1e-5.
        """
        (gradient, _), (expected, _), condition = leads(500.0, curvature="gauss-newton")
        tolerance = 4 * condition * torch.finfo(torch.float32).eps
        assert tolerance < 1e-3
        assert relative_error(gradient, expected) < tolerance

    @pytest.mark.parametrize("lam", [0.02, 1e-30])
    def test_gauss_newton_with_a_decayed_lam(self, leads, lam):
        """500 exp(-10) after 1e6 steps with --lam-decay 1e5: κ · eps > 1, so nothing is promised by conditioning.

        But K itself has full rank in such a batch (least eigenvalue 650 against λ_max 6e5). Measured: 2e-5.
        """
        (gradient, _), (expected, _), _ = leads(lam, curvature="gauss-newton")
        assert gradient.isfinite().all()
        assert relative_error(gradient, expected) < 1e-3

    def test_hessian(self, leads):
        """With M of relative error κ · eps on each of up to ten iterations. Measured: 5e-4."""
        (gradient, _), (expected, _), condition = leads(500.0)
        tolerance = 40 * condition * torch.finfo(torch.float32).eps
        assert tolerance < 1e-2
        assert relative_error(gradient, expected) < tolerance

    @pytest.mark.parametrize("lam", [0.02, 1e-6, 1e-12, 1e-20, 1e-30])
    def test_hessian_with_a_decayed_lam(self, leads, lam):
        """(r - 𝒥ᵀ(K + λB/2)⁻¹𝒥r)/λ cancels and then divides by λ: without a bound on λ it is rounding alone, 10 to
        1e5 times too large, and what conjugate gradient falls back to at negative curvature (H is indefinite here)."""
        (gradient, info), _, _ = leads(lam)
        (_, gauss_newton_info), _, _ = leads(500.0, curvature="gauss-newton")
        assert gradient.isfinite().all()
        assert info["implicit_norm"] < 1.2 * gauss_newton_info["implicit_norm"]


def layers(activation):
    """`mlp` with something else between its Linear layers."""

    def mlp(*sizes):
        modules = []
        for n_in, n_out in zip(sizes[:-1], sizes[1:]):
            modules += [nn.Linear(n_in, n_out), *activation(n_out)]
        modules = modules[: -len(activation(1))]
        return (
            nn.Sequential(nn.Sequential(*modules[:2]), *modules[2:])
            if activation is NETWORKS["nested"]
            else (nn.Sequential(*modules))
        )

    return mlp


NETWORKS = {
    "ReLU": lambda n: [nn.ReLU()],
    "tanh": lambda n: [nn.Tanh()],
    "SiLU": lambda n: [nn.SiLU()],
    "ELU": lambda n: [nn.ELU()],
    "LayerNorm": lambda n: [nn.LayerNorm(n, elementwise_affine=False), nn.ELU()],
    "nested": lambda n: [nn.Tanh()],
}


class TestChangedNetworks:
    """Somebody swaps the activation in `mlp`, and nothing else."""

    @pytest.fixture(params=NETWORKS)
    def activation(self, script, request, monkeypatch):
        monkeypatch.setattr(script, "mlp", layers(NETWORKS[request.param]))

    @pytest.fixture(params=[(6,), (5, 8), (7, 3, 5)], ids=str)
    def game(self, script, request, activation):
        return Game(script, request.param, 9, seed=3)

    @pytest.mark.parametrize("lam", [1e-2, 10.0])
    def test_gauss_newton(self, script, game, lam):
        direct, grad2_f1, mixed, _ = dense(game, "actor")
        H = gauss_newton(game)
        implicit = -mixed.T @ torch.linalg.solve(H + lam * eye_like(H), grad2_f1)
        f_actor, f_critic, grad_theta, grad_w, _ = game.gradients(lam, curvature="gauss-newton")
        assert implicit.norm() > 1e-3 * direct.norm()
        assert (vector(grad_theta) - (direct + implicit)).norm() < 1e-8 * implicit.norm()
        assert relative_error(vector(grad_w), vector(torch.autograd.grad(game("critic"), game.w))) < 1e-12
        torch.testing.assert_close([f_actor, f_critic], [game("actor").detach(), game("critic").detach()])

    @pytest.mark.parametrize("precondition", [True, False])
    def test_hessian(self, script, game, precondition):
        direct, grad2_f1, mixed, hessian = dense(game, "actor")
        lam = positive_definite_lam(hessian)
        implicit = -mixed.T @ torch.linalg.solve(hessian + lam * eye_like(hessian), grad2_f1)
        *_, grad_theta, grad_w, info = game.gradients(lam, precondition=precondition)
        assert (vector(grad_theta) - (direct + implicit)).norm() < 1e-8 * implicit.norm()
        assert info["residual"] < 1e-12 and not info["negative_curvature"]
        assert relative_error(vector(grad_w), vector(torch.autograd.grad(game("critic"), game.w))) < 1e-12

    def test_critic_leads(self, script, game):
        direct, grad2_f1, mixed, hessian = dense(game, "critic")
        lam = positive_definite_lam(hessian)
        implicit = -mixed.T @ torch.linalg.solve(hessian + lam * eye_like(hessian), grad2_f1)
        grad_w = game.gradients(lam, leader="critic")[3]
        assert (vector(grad_w) - (direct + implicit)).norm() < 1e-8 * implicit.norm()

    def test_is_accepted_and_trains(self, script, activation, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert script.train(run_args(script, **GAUSS_NEWTON, hidden=(6, 4))).exists()


class TestChangedLosses:
    def change(self, script, monkeypatch, loss):
        """Replaces `critic_loss` by the sum of loss(Q, y) over the Q networks."""

        def critic_loss(actor, critic, target_critic, batch, gamma, *alpha):
            y = script.td_target(actor, target_critic, batch, gamma, *alpha)
            qs = critic(batch.obs, batch.actions)
            return sum(loss(q, y) for q in (qs if script is stsac else [qs]))

        monkeypatch.setattr(script, "critic_loss", critic_loss)
        return Game(script, seed=2)

    def huber(self, script, monkeypatch):
        """Every other residual is an outlier."""
        game = self.change(script, monkeypatch, None)
        residuals = torch.cat([q(game.x)[:, 0] - game.y() for q in game.qs]).abs()
        delta = residuals.quantile(0.5).item()  # between two of them
        return self.change(script, monkeypatch, lambda q, y: F.huber_loss(q, y, delta=delta))

    @pytest.mark.parametrize("precondition", [True, False])
    @pytest.mark.parametrize("leader", ["actor", "critic"])
    def test_huber(self, script, leader, precondition, monkeypatch):
        """The Hessian's way equals its own dense oracle."""
        game = self.huber(script, monkeypatch)
        direct, grad2_f1, mixed, hessian = dense(game, leader)
        lam = positive_definite_lam(hessian)
        implicit = -mixed.T @ torch.linalg.solve(hessian + lam * eye_like(hessian), grad2_f1)
        assert implicit.norm() > 1e-3 * direct.norm()
        result = game.gradients(lam, leader=leader, precondition=precondition)
        assert (vector(result[2 if leader == "actor" else 3]) - (direct + implicit)).norm() < 1e-8 * implicit.norm()
        own = vector(torch.autograd.grad(game("critic"), game.w))
        assert leader == "critic" or relative_error(vector(result[3]), own) < 1e-12

    def test_weighted_squares(self, script, monkeypatch):
        """Gauss-Newton takes ∂²L/∂Q² from the loss, so a factor or a weight for each sample is no mistake."""
        weights = torch.rand(12).double() + 0.1
        game = self.change(script, monkeypatch, lambda q, y: (weights * (q - y) ** 2).mean() / 2)
        direct, grad2_f1, mixed, _ = dense(game, "actor")
        Js = [jacobian(q, game.x) for q in game.qs]
        H = torch.block_diag(*(J.T @ (weights[:, None] / 12 * J) for J in Js))
        implicit = -mixed.T @ torch.linalg.solve(H + 0.1 * eye_like(H), grad2_f1)
        *_, grad_theta, grad_w, _ = game.gradients(0.1, curvature="gauss-newton")
        assert (vector(grad_theta) - (direct + implicit)).norm() < 1e-8 * implicit.norm()
        assert relative_error(vector(grad_w), vector(torch.autograd.grad(game("critic"), game.w))) < 1e-12

    def test_gauss_newton_of_a_loss_elsewhere_is_not_silent(self, script, monkeypatch):
        """A term of Q at other actions, as CQL has: the closed form knows L at the batch's (s, a) alone."""
        original = script.critic_loss

        def critic_loss(actor, critic, target_critic, batch, *rest):
            elsewhere = critic(batch.obs, -batch.actions)
            penalty = sum(q.mean() for q in elsewhere) if script is stsac else elsewhere.mean()
            return original(actor, critic, target_critic, batch, *rest) + penalty

        monkeypatch.setattr(script, "critic_loss", critic_loss)
        with pytest.raises(AssertionError, match="at the batch's"):
            Game(script).gradients(1.0, curvature="gauss-newton")

    def test_gauss_newton_without_curvature_is_not_silent(self, script, monkeypatch):
        """Huber's outliers have none: no number comes out that could be taken for a gradient."""
        game = self.huber(script, monkeypatch)
        *_, grad_theta, _, _ = game.gradients(1.0, curvature="gauss-newton")
        assert vector(grad_theta).isnan().any()


class Residual(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


class Functional(nn.Module):
    """The way CleanRL writes its networks: the activations are no modules."""

    def __init__(self, *layers):
        super().__init__()
        self.fc1, self.fc2 = layers

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


class Scaled(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * super().forward(x)


class Tied(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self[2].weight = self[4].weight


def twice(n_in):
    hidden = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(n_in, 4), nn.ReLU(), hidden, nn.ReLU(), hidden, nn.ReLU(), nn.Linear(4, 1))


UNKNOWN = {
    "affine LayerNorm": lambda n: nn.Sequential(nn.Linear(n, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 1)),
    "PReLU": lambda n: nn.Sequential(nn.Linear(n, 4), nn.PReLU(), nn.Linear(4, 1)),
    "no bias": lambda n: nn.Sequential(nn.Linear(n, 4, bias=False), nn.ReLU(), nn.Linear(4, 1)),
    "a parameter of its own": lambda n: Scaled(nn.Linear(n, 4), nn.ReLU(), nn.Linear(4, 1)),
    "a Linear used twice": twice,
    "tied weights": lambda n: Tied(
        nn.Linear(n, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 1)
    ),
    "a skip connection": lambda n: Residual(nn.Linear(n, 4), nn.ReLU(), nn.Linear(4, 1)),
    "activations that are no modules": lambda n: Functional(nn.Linear(n, 4), nn.Linear(4, 1)),
    "dropout": lambda n: nn.Sequential(nn.Linear(n, 4), nn.Dropout(0.5), nn.Linear(4, 1)),
    "batch norm": lambda n: nn.Sequential(nn.Linear(n, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)),
    "in-place activation": lambda n: nn.Sequential(nn.Linear(n, 4), nn.ReLU(inplace=True), nn.Linear(4, 1)),
}


class TestRefusals:
    """What `jacobian` cannot know is refused before training, in one line, and only where it is needed."""

    @pytest.fixture(params=UNKNOWN)
    def unknown(self, script, request, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)

        class Critic(script.Critic):
            def __init__(self, observation_space, action_space, hidden):
                super().__init__(observation_space, action_space, hidden)
                for name, _ in list(self.named_children()):
                    setattr(self, name, UNKNOWN[request.param](4))

        monkeypatch.setattr(script, "Critic", Critic)

    def refused(self, script, capsys, **changes):
        with pytest.raises(SystemExit) as error:
            script.train(run_args(script, **changes))
        message = capsys.readouterr().err
        assert error.value.code == 2 and message.count("\n") == 1 and "--no-precondition" in message
        assert not Path("runs").exists()

    @pytest.mark.parametrize("changes", [{"curvature": "gauss-newton"}, {}], ids=["gauss-newton", "preconditioner"])
    def test_refused(self, script, unknown, changes, capsys):
        self.refused(script, capsys, leader="actor", **changes)

    def test_taken_by_what_does_not_need_it(self, script, unknown):
        for changes in ({"leader": "actor", "precondition": False}, {"leader": "critic"}, {"leader": "none"}):
            assert script.train(run_args(script, **changes)).exists()

    def test_a_shared_trunk(self, script, monkeypatch, capsys, tmp_path):
        """A child of the critic that is no Q network of [s, a]."""
        monkeypatch.chdir(tmp_path)

        class Critic(script.Critic):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                self.trunk = nn.Linear(2, 2)

            def forward(self, obs, actions):
                return super().forward(self.trunk(obs), actions)

        monkeypatch.setattr(script, "Critic", Critic)
        self.refused(script, capsys, leader="actor")

    def test_another_forward(self, script, monkeypatch, capsys, tmp_path):
        """The Q networks are known, what the critic makes of them is not."""
        monkeypatch.chdir(tmp_path)

        class Critic(script.Critic):
            def forward(self, obs, actions):
                return super().forward(obs**2, actions)

        monkeypatch.setattr(script, "Critic", Critic)
        self.refused(script, capsys, leader="actor", curvature="gauss-newton")


def preconditioned(A, b, M, max_iters=100, tol=1e-12, matvec=None):
    return stsac.conjugate_gradient(matvec or (lambda v: A @ v), b, max_iters, tol, lambda r: M @ r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestPreconditionedSolver:
    def test_exact_inverse_takes_one_iteration(self, dtype):
        """Preconditioned by its inverse the system is the identity."""
        A = spd(30, 1e2, dtype=dtype)
        b = torch.randn(30, dtype=dtype)
        x, info = preconditioned(A, b, torch.linalg.inv(A), tol=1e3 * torch.finfo(dtype).eps)
        assert info["iterations"] == 1
        torch.testing.assert_close(A @ x, b, rtol=1e-3 if dtype == torch.float32 else 1e-10, atol=1e-4)

    def test_a_good_one_saves_iterations(self, dtype):
        """An inverse of A up to a perturbation, against no preconditioner."""
        A, tol = spd(30, 1e4, dtype=dtype), 1e-3
        b, calls = torch.randn(30, dtype=dtype), []
        M = torch.linalg.inv(A + 0.1 * torch.diag(torch.rand(30, dtype=dtype)))
        x, info = preconditioned(A, b, M, tol=tol, matvec=lambda v: calls.append(1) or A @ v)
        _, plain = stsac.conjugate_gradient(lambda v: A @ v, b, 100, tol)
        assert info["iterations"] <= 3 < plain["iterations"]
        assert len(calls) == info["iterations"]  # what it falls back to costs no product of its own
        assert (b - A @ x).norm() / b.norm() < 1.1 * tol

    def test_falls_back_to_a_better_residual(self, dtype):
        """One step along Mb, as long as energy wants it, has five times Mb's residual."""
        A, M = torch.diag(torch.tensor([1.0, 100.0], dtype=dtype)), torch.diag(torch.tensor([0.1, 0.01], dtype=dtype))
        b = torch.ones(2, dtype=dtype)
        x, info = preconditioned(A, b, M, max_iters=1)
        assert torch.equal(x, M @ b) and info["iterations"] == 1 and not info["negative_curvature"]
        torch.testing.assert_close(info["residual"], (b - A @ x).norm() / b.norm())
        x, info = preconditioned(A, b, M, max_iters=2, tol=0.0)  # with the budget to go on, it does
        assert (A @ x - b).norm() < 1e-4 and info["residual"] < 1e-4

    def test_negative_curvature_at_once(self, dtype):
        """Mb, whatever its residual, which is the true one."""
        A, b = torch.diag(torch.tensor([-2.0, 3.0], dtype=dtype)), torch.tensor([1.0, 0.1], dtype=dtype)
        M = torch.diag(torch.tensor([0.5, 0.25], dtype=dtype))
        x, info = preconditioned(A, b, M)
        assert torch.equal(x, M @ b) and info["negative_curvature"] and info["iterations"] == 0
        torch.testing.assert_close(info["residual"], (b - A @ x).norm() / b.norm())
        assert info["residual"] > 1

    def test_random_systems(self, dtype):
        """Indefinite or not, cut short or not: the residual is that of x, and never larger than Mb's."""
        kinds = set()
        for seed in range(60):
            torch.manual_seed(seed)
            A, M = spd(8, 50, seed, dtype), spd(8, 20, seed + 1000, dtype)
            A = A - (seed % 3) * 2 * torch.eye(8, dtype=dtype)
            b = torch.randn(8, dtype=dtype)
            x, info = preconditioned(A, b, M, max_iters=1 + seed % 5, tol=1e-3)
            residual, Mb_residual = ((b - A @ v).norm() / b.norm() for v in (x, M @ b))
            torch.testing.assert_close(info["residual"], residual, rtol=1e-4, atol=1e-4)
            assert residual <= Mb_residual * (1 + 1e-4)
            kinds.add((torch.equal(x, M @ b), bool(info["negative_curvature"])))
        assert len(kinds) >= 3

    def test_zero_right_hand_side(self, dtype):
        A = spd(10, 10, dtype=dtype)
        x, info = preconditioned(A, torch.zeros(10, dtype=dtype), A)
        assert (x == 0).all() and info["residual"] == 0 and info["iterations"] == 0 and not info["negative_curvature"]

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("where", ["b", "A", "M"])
    def test_not_finite_at_once(self, dtype, bad, where):
        """Nothing to fall back to: 0, an infinite residual and no NaN."""
        system = {"A": spd(10, 10, dtype=dtype), "b": torch.ones(10, dtype=dtype), "M": spd(10, 10, 1, dtype)}
        system[where].view(-1)[0] = bad
        x, info = preconditioned(**system)
        assert (x == 0).all() and info["residual"] == math.inf and info["iterations"] == 0
        assert not any(value.isnan() for value in info.values())

    def test_not_finite_later_keeps_the_iterate(self, dtype):
        A, M, b = spd(10, 100, dtype=dtype), spd(10, 10, 1, dtype), torch.ones(10, dtype=dtype)
        x, info = preconditioned(A, b, M, matvec=breaks_after(A, 3))
        assert x.isfinite().all() and x.abs().sum() > 0 and not torch.equal(x, M @ b)
        assert info["iterations"] == 2 and info["residual"] == math.inf

    def test_masks_do_what_the_early_stop_does(self, dtype):
        """What runs on a GPU and in a compiled function: a fixed number of iterations, masked."""
        source = inspect.getsource(stsac.conjugate_gradient)
        early_stop = 'b.device.type == "cpu" and not torch.compiler.is_compiling()'
        assert early_stop in source
        masked = dict(vars(stsac))
        exec(source.replace(early_stop, "False"), masked)
        torch.manual_seed(0)
        good, M, b = spd(8, 10, dtype=dtype), spd(8, 5, 1, dtype), torch.randn(8, dtype=dtype)
        bad = b.clone()
        bad[0] = math.nan
        cases = [(good, b, 100), (good, bad, 100), (good, 0 * b, 100), (good, b, 2)]
        cases += [(spd(8, 50, s, dtype) - 4 * torch.eye(8, dtype=dtype), b, 100) for s in range(5)]
        cases += [(-good, b, 100)]
        for A, b, max_iters in cases:
            for matvec in (lambda A: lambda v: A @ v, lambda A: breaks_after(A, 1), lambda A: breaks_after(A, 3)):
                x, info = preconditioned(A, b, M, max_iters, 1e-5, matvec(A))
                x_masked, info_masked = masked["conjugate_gradient"](matvec(A), b, max_iters, 1e-5, lambda r: M @ r)
                assert torch.equal(x, x_masked) and info == info_masked


def breaks_after(A, products):
    """v -> Av, from the given product on NaN."""
    calls = []
    return lambda v: calls.append(1) or (A @ v if len(calls) < products else math.nan * v)


GAUSS_NEWTON = {"leader": "actor", "curvature": "gauss-newton"}
PLAYERS = [GAUSS_NEWTON, {"leader": "actor"}, {"leader": "critic"}]


def run_args(script, **changes):
    """A run of eleven updates, with everything on that changes from one to the next."""
    autotune = {"autotune": True} if script is stsac else {}
    sizes = {"hidden": (4,), "batch_size": 8, "total_timesteps": 110, "eval_every": 1000, "start_steps": 100}
    return small_args(script, lam=5.0, lam_decay=20.0, **{**sizes, **autotune, **changes})


class TestCompile:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        torch._dynamo.reset()
        # --compile sets trace_autograd_ops: this puts it back. λ and α change at every step, the code must not
        with torch._dynamo.config.patch(error_on_recompile=True, trace_autograd_ops=False):
            yield

    def run(self, script, monkeypatch, **changes):
        """Trains with --compile; each compiled gradient against the eager one on the same noise."""
        update, seen = script.stackelberg_update, []

        def comparing(nets, optimizers, batches, *rest):
            *rest, gradients = rest
            inputs = *nets, batches[0], *rest
            assert gradients is not script.player_gradients
            state = torch.get_rng_state()
            compiled = gradients(*inputs)
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            eager = script.player_gradients(*inputs)
            assert torch.equal(torch.get_rng_state(), after)  # as much noise, so resuming with or without is the same
            torch.set_rng_state(state)
            for a, b in zip(compiled[:2], eager[:2]):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            for a, b in zip(compiled[2:4], eager[2:4]):
                assert [t.shape for t in a] == [t.shape for t in b]
                # float32 rounding, 1e-7, times the condition number of a game of this size
                assert relative_error(vector(a), vector(b)) < 1e-4
            assert compiled[4].keys() == eager[4].keys()
            for name in compiled[4]:
                torch.testing.assert_close(compiled[4][name], eager[4][name], rtol=1e-3, atol=1e-4)
            seen.append(rest[-2])
            return update(nets, optimizers, batches, *rest, gradients)

        with monkeypatch.context() as patch:
            patch.setattr(script, "stackelberg_update", comparing)
            run_dir = script.train(run_args(script, compile=True, **changes))
        assert len(seen) == len(set(seen)) == 11  # λ was another one each time
        return run_dir

    @pytest.mark.parametrize("changes", PLAYERS, ids=lambda changes: "-".join(changes.values()))
    def test_traces(self, script, changes, monkeypatch):
        """Every leader and curvature becomes one graph that is right for every λ: all but the machine code."""
        compile_ = torch.compile

        def without_machine_code(function, fullgraph, options=None):
            return compile_(function, fullgraph=fullgraph, backend="aot_eager")

        monkeypatch.setattr(torch, "compile", without_machine_code)
        self.run(script, monkeypatch, **changes)

    @pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
    @pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch about itself
    @pytest.mark.parametrize("script, changes", [(stddpg, {**GAUSS_NEWTON, "hidden": ()}), (stsac, {"cg_iters": 1})])
    def test_machine_code(self, script, changes, monkeypatch):
        """The same run compiled and not: the same weights to float32 rounding, with the same noise.

        Each layer and each iteration costs the compiler seconds, and `test_traces` has more of them.
        """
        compiled = weights(self.run(script, monkeypatch, **changes))
        eager = weights(script.train(run_args(script, **changes)))
        start = weights(script.train(replace(run_args(script, **changes), policy_lr=0.0, q_lr=0.0)))
        for name in eager:
            torch.testing.assert_close(compiled[name], eager[name], rtol=0, atol=1e-5)
        assert max((eager[name] - start[name]).abs().max() for name in eager) > 5e-3  # eleven steps of 1e-3

    def test_without_a_compiler(self, tmp_path):
        """torch's own exception, whose last lines say what is missing."""
        env = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        env["PYTHONPATH"] = str(Path(__file__).parent)
        run = small_args(stddpg, compile=True, total_timesteps=110)
        code, _, err = finish(command(*flags(run), cwd=tmp_path, script=stddpg.__file__, env=env))
        assert code == 1 and "/nonexistent" in err.split("Traceback")[-1]


class TestFlags:
    @pytest.mark.parametrize(
        "line, reason",
        [
            (["--curvature", "gauss-newton", "--leader", "critic"], "-J is no sum of squares"),
            (["--curvature", "gauss-newton", "--lam", "0"], "needs a positive --lam"),
        ],
    )
    def test_refused(self, script, line, reason, tmp_path, monkeypatch, capsys):
        """Gauss-Newton where there is none, or where it is not invertible."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script.__file__, *line, "--total-timesteps", "1"])
        with pytest.raises(SystemExit) as error:
            script.main()
        message = capsys.readouterr().err
        assert error.value.code == 2 and reason in message and message.count("\n") == 1
        assert not (tmp_path / "runs").exists()

    def test_accepted(self, script):
        """It does not matter to the plain algorithm, nor does λ = 0 to the full Hessian."""
        script.check_args(script.Args(leader="none", curvature="gauss-newton"))
        script.check_args(script.Args(leader="actor", curvature="gauss-newton"))
        script.check_args(script.Args(leader="actor", lam=0.0))

    def test_ignored_by_the_plain_algorithm(self, script, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        runs = [run_args(script, leader="none", curvature=curvature) for curvature in ("hessian", "gauss-newton")]
        assert_same_weights(*(script.train(run) for run in runs))

    def test_preconditioner_without_lam(self, script, monkeypatch):
        """λ = 0: the Gauss-Newton matrix of a batch is singular, but the preconditioner's damping has a lower bound."""
        calls = record(monkeypatch, script, "conjugate_gradient")
        *_, grad_theta, _, info = Game(script).gradients(0.0, lam=0.0, cg_iters=5)
        (_, b, _, _, preconditioner), _ = calls[0]
        assert (preconditioner(b) @ b).item() > 0
        assert vector(grad_theta).isfinite().all() and info["residual"].isfinite()


def test_resumes(script, tmp_path, monkeypatch):
    """Bit for bit, with Gauss-Newton as with every other leader."""
    monkeypatch.chdir(tmp_path)
    flags = {**GAUSS_NEWTON, "checkpoint_every": 50, "eval_every": 1000, "lam_decay": 100.0}
    run = small_args(script, total_timesteps=150, start_steps=50, **flags)
    whole = script.train(replace(run, total_timesteps=180))
    short = script.train(run)
    saved = torch.load(short / "checkpoint.pt", weights_only=True)["global_step"]
    assert 100 < saved < 150
    assert_same_weights(whole, script.train(replace(run, total_timesteps=180, resume=str(short))))
    with pytest.raises(AssertionError):  # the flag matters
        assert_same_weights(whole, script.train(replace(run, total_timesteps=180, curvature="hessian")))
