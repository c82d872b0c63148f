"""The actor-leader's gradient in sample space: factored Jacobian, Gauss-Newton, preconditioner, --compile."""

import copy
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
    """Both costs on one stream of noise, drawn in the order in which `actor_leads` draws it."""

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
        if self.script is stsac:
            self.actor.get_action(self.batch.obs)
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

    def actor_leads(self, current_lam, **changes):
        args = self.script.Args(gamma=GAMMA, **{"cg_iters": 1000, "cg_tol": 1e-13, **changes})
        torch.manual_seed(NOISE)
        nets = self.actor, self.critic, self.target_critic
        return self.script.actor_leads(*nets, self.batch, *self.entropy, current_lam, args)


def jacobian(q, x):
    """∂Q/∂w, [B, n], row by row through autograd."""
    params = list(q.parameters())
    return torch.stack([vector(torch.autograd.grad(out, params, retain_graph=True)) for out in q(x)[:, 0]])


def gauss_newton(game):
    """The explicit Gauss-Newton matrix of L, one block for each critic, and the Jacobians."""
    Js = [jacobian(q, game.x) for q in game.qs]
    return torch.block_diag(*(2 / len(J) * J.T @ J for J in Js)), Js


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
        """A wrong ReLU mask, layer order, transpose or forgotten bias in the factors or in what is made of them."""
        other = torch.randn(5, game.x.shape[1]).double()
        for q in game.qs:
            dense_J, dense_other = jacobian(q, game.x), jacobian(q, other)
            with torch.no_grad():
                out, J = script.jacobian_factors(q, game.x)
                _, J_other = script.jacobian_factors(q, other)
                v, c = torch.randn(dense_J.shape[1]).double(), torch.randn(len(out)).double()
                close = {"rtol": 1e-12, "atol": 1e-12}
                torch.testing.assert_close(out, q(game.x)[:, 0], **close)
                torch.testing.assert_close(script.jvp(J, v), dense_J @ v, **close)
                product = script.vjp(J, c)
                assert [t.shape for t in product] == [p.shape for p in q.parameters()]
                torch.testing.assert_close(vector(product), dense_J.T @ c, **close)
                torch.testing.assert_close(script.tangent_kernel(J, J), dense_J @ dense_J.T, **close)
                torch.testing.assert_close(script.tangent_kernel(J, J_other), dense_J @ dense_other.T, **close)
                part = script.rows(J_other, slice(3, None))
                torch.testing.assert_close(script.jvp(part, v), dense_other[3:] @ v, **close)

    def test_hessian_vector_product(self, script, game):
        """Pearlmutter's product against the dense Hessian of `critic_loss` and against double backward through it."""
        hessian = critic_hessian(game)
        v = torch.randn(len(hessian)).double()
        first = vector_with_graph(torch.autograd.grad(game("critic"), game.w, create_graph=True))
        double_backward = vector(torch.autograd.grad(first, game.w, v, materialize_grads=True))
        with torch.no_grad():
            products = []
            for q, u in zip(game.qs, v.chunk(len(game.qs))):
                out, J = script.jacobian_factors(q, game.x)
                f2_q = 2 / len(out) * (out - game.y())
                products.append(script.hessian_vector_product(q, J, f2_q, u))
        product = torch.cat(products)
        assert relative_error(product, hessian @ v) < 1e-12
        assert relative_error(product, double_backward) < 1e-12

    def test_ridge_solver(self, script):
        """(K + (λB/2) I)⁻¹: with λ instead of λB/2 the damping would be off by half the batch size."""
        K, c = spd(10, 1e3), torch.randn(10).double()
        for lam in (1e-3, 1.0, 1e4):
            expected = torch.linalg.solve(K + 5 * lam * eye_like(K), c)
            torch.testing.assert_close(script.ridge_solver(K.clone(), lam)(c), expected, rtol=1e-10, atol=1e-12)


def vector_with_graph(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


# parameters of one critic: 59, 59, 59, 29, 6, of which the last two are fewer than the samples
SHAPES = [((5, 4), 12), ((5, 4), 1), ((5, 4), 40), ((4,), 64), ((), 20)]


class TestGaussNewton:
    @pytest.mark.parametrize("lam", [1e-3, 1.0, 500.0, 1e4])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_equals_the_dense_formula(self, script, shape, lam, monkeypatch):
        """df1/dy and the leader's gradient with (H_GN + λI)⁻¹ built explicitly, of both critics as one block each."""
        game = Game(script, *shape, seed=1)
        B = shape[1]
        direct, grad2_f1, mixed, _ = dense(game, "actor")
        H, Js = gauss_newton(game)
        v = torch.linalg.solve(H + lam * eye_like(H), grad2_f1)
        implicit = -mixed.T @ v
        calls = record(monkeypatch, script, "target_weights")
        *_, grad_theta, _, info = game.actor_leads(lam, curvature="gauss-newton")
        ((_, (df1_dy, _)),) = calls
        # κ · eps = 1e5 · 2e-16 at λ = 1e-3
        assert relative_error(df1_dy, 2 / B * sum(J @ u for J, u in zip(Js, v.chunk(len(Js))))) < 1e-8
        assert (vector(grad_theta) - (direct + implicit)).norm() < 1e-8 * implicit.norm()
        torch.testing.assert_close(info["direct_norm"], direct.norm())
        torch.testing.assert_close(info["implicit_norm"], implicit.norm())
        torch.testing.assert_close(info["cosine"], torch.cosine_similarity(direct, implicit, dim=0))
        assert info.keys() == {"direct_norm", "implicit_norm", "cosine"}  # there is no solver to report on

    def test_each_critic_has_its_own_block(self, monkeypatch):
        """∇_wJ reaches only the arg-min critic: with one that is never smaller, the other alone has a term."""
        game = Game(stsac)
        calls = record(monkeypatch, stsac, "target_weights")
        game.actor_leads(1.0, curvature="gauss-newton")
        f1_q = calls[0][0][2]
        first = f1_q[0] != 0
        assert first.any() and not first.all()  # the game of the other tests uses both
        torch.testing.assert_close(f1_q[0] + f1_q[1], torch.full((12,), -1 / 12).double())
        assert ((f1_q[0] == 0) | (f1_q[1] == 0)).all()
        game.critic.q2[-1].bias.data += 1e3  # never the smaller one
        one = Game(stddpg)
        one.critic.q1, one.batch, one.actor = game.critic.q1, game.batch, game.actor
        game.actor_leads(1.0, curvature="gauss-newton")
        J = jacobian(one.critic.q1, game.x)
        torch.manual_seed(NOISE)
        actions, _ = game.actor.get_action(game.batch.obs)
        J_pi = jacobian(one.critic.q1, torch.cat([game.batch.obs, actions.detach()], dim=-1))
        expected = torch.linalg.solve(J @ J.T + 6 * torch.eye(12).double(), -J_pi.mean(0) @ J.T)
        assert relative_error(calls[1][1][0], expected) < 1e-10

    @pytest.mark.parametrize("lam", [1e-2, 10.0])
    def test_is_exact_where_the_residual_is_zero(self, script, lam):
        """Where the critics fit their targets the Hessian is its Gauss-Newton part, so this is the total derivative."""
        game = Game(script, (8, 8), 6).fit()
        direct, grad2_f1, mixed, hessian = dense(game, "actor")
        assert relative_error(gauss_newton(game)[0], hessian) < 1e-11
        implicit = -mixed.T @ torch.linalg.solve(hessian + lam * eye_like(hessian), grad2_f1)
        for curvature in ("gauss-newton", "hessian"):
            *_, grad_theta, _, info = game.actor_leads(lam, curvature=curvature)
            assert (vector(grad_theta) - (direct + implicit)).norm() < 1e-8 * implicit.norm()
        assert info["iterations"] <= 2  # the preconditioner is then the inverse, to rounding

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("lam", [0.02, 1e-30])
    def test_singular_kernel(self, script, lam, dtype, monkeypatch):
        """A batch with repetitions has a singular K: without a floor under λ rounding would make it indefinite."""
        game = Game(script, (8, 8), 12).to(dtype)
        index = torch.arange(12) // 4
        game.batch = script.Batch(*(1e3 * column[index].to(dtype) for column in game.batch))
        calls = record(monkeypatch, script, "target_weights")
        *_, grad_theta, _, _ = game.actor_leads(lam, curvature="gauss-newton")
        assert calls[0][1][0].isfinite().all() and vector(grad_theta).isfinite().all()


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
        *_, grad_theta, _, info = game.actor_leads(lam, precondition=precondition)
        assert (vector(grad_theta) - (direct + implicit)).norm() < 1e-8 * implicit.norm()
        assert info["residual"] < 1e-13 and not info["negative_curvature"]
        H = gauss_newton(game)[0]
        wrong = -mixed.T @ torch.linalg.solve(H + lam * eye_like(H), grad2_f1)
        assert relative_error(wrong, implicit) > 1e-3  # the residual part matters here

    @pytest.mark.parametrize("seed", range(5))
    def test_preconditioner_saves_products(self, script, seed, monkeypatch):
        """Small residuals, a large spread of curvature: the relative residual is 1e-3 after at most three products."""
        game = Game(script, (6, 20), 6, seed=seed).fit(noise=1e-4)
        hessian = critic_hessian(game)
        eigenvalues = torch.linalg.eigvalsh(hessian)
        lam = float(1e-4 * eigenvalues[-1])
        assert eigenvalues[0] + lam > 0
        products = record(monkeypatch, script, "hessian_vector_product")
        counts = {}
        for precondition in (True, False):
            products.clear()
            *_, info = game.actor_leads(lam, precondition=precondition, cg_tol=1e-3)
            counts[precondition] = len(products) / len(game.qs)
            assert info["iterations"] == counts[precondition]
            assert info["residual"] <= 1e-3 and not info["negative_curvature"]
        assert counts[True] <= 3 < counts[False]

    def test_preconditioner_is_the_gauss_newton_solve(self, script, monkeypatch):
        """M r = (H_GN + λI)⁻¹ r; another scale would only show where Mb is fallen back to."""
        game = Game(script)
        calls = record(monkeypatch, script, "conjugate_gradient")
        game.actor_leads(0.3, cg_iters=1)
        preconditioner = calls[0][0][4]
        H = gauss_newton(game)[0]
        r = torch.randn(len(H)).double()
        assert relative_error(preconditioner(r), torch.linalg.solve(H + 0.3 * eye_like(H), r)) < 1e-11

    @pytest.mark.parametrize("lam", [1e-2, 1.0])
    def test_indefinite_is_no_worse_than_gauss_newton(self, script, lam, monkeypatch):
        """Large residuals: finite, said so, and by model and residual no worse than the Gauss-Newton solution.

        Both are of Av = b. If already the first product shows negative curvature, it is the Gauss-Newton solution.
        """
        solves = record(monkeypatch, script, "conjugate_gradient")
        calls = record(monkeypatch, script, "target_weights")
        first = []
        for seed in range(15):
            game = Game(script, (4, 3), 8, seed=seed).shift_targets((3.0, 30.0, 300.0)[seed % 3])
            _, b, _, hessian = dense(game, "actor")
            A = hessian + lam * eye_like(hessian)
            assert torch.linalg.eigvalsh(A)[0] < -1e-3
            H = gauss_newton(game)[0]
            v_gn = torch.linalg.solve(H + lam * eye_like(H), b)
            *_, grad_theta, _, info = game.actor_leads(lam)
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
                weights = calls[-1][1][0]
                game.actor_leads(lam, curvature="gauss-newton")
                assert relative_error(weights, calls[-1][1][0]) < 1e-9
        assert any(first) and not all(first)


class TestWeightedTargets:
    @pytest.mark.parametrize("precondition", [True, False])
    @pytest.mark.parametrize("hidden", [(), (5, 4)], ids=str)
    def test_equals_stackelberg_gradient(self, script, hidden, precondition):
        """All of `actor_leads` against double backward through f1 = -J and f2 = L, and against autograd."""
        game = Game(script, hidden, seed=2)
        game.target_critic.requires_grad_(True)
        lam = positive_definite_lam(dense(game, "actor")[3])
        expected, expected_info = game.stackelberg_gradient("actor", lam)
        f_actor, f_critic, grad_theta, grad_w, info = game.actor_leads(lam, precondition=precondition)
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
        *_, info = Game(script, seed=2).actor_leads(1.0, curvature="gauss-newton")
        assert info["implicit_norm"] > 1e-2 * info["direct_norm"]

    def test_player_gradients_leads_with_it(self, script, monkeypatch):
        """`player_gradients` takes this way for the actor as leader alone."""
        game = Game(script)
        calls = record(monkeypatch, script, "actor_leads")
        for leader in ("actor", "critic", "none"):
            policy = (game.actor,) if script is stddpg else ()
            args = script.Args(leader=leader, cg_iters=2)
            nets = game.actor, game.critic, game.target_critic, *policy
            script.player_gradients(*nets, game.batch, *game.entropy, 5.0, args)
            assert len(calls) == 1


class TestSingle:
    """At the scale of Hopper (two layers of 256, batch 100, values in the thousands), in float32 against float64."""

    SPACES = Box(-1.0, 1.0, (11,)), Box(-1.0, 1.0, (3,))

    @pytest.fixture
    def leads(self, script, monkeypatch):
        """(lam, **flags) -> df1/dy and the leader's gradient in float32, the same in float64, and κ."""
        torch.manual_seed(0)
        actor, critic, target_critic = nets = [
            net(*self.SPACES) for net in (script.Actor, script.Critic, script.Critic)
        ]
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
            with torch.no_grad():
                out, J = script.jacobian_factors(q, x)
                largest = max(largest, float(2 / B * torch.linalg.eigvalsh(script.tangent_kernel(J, J))[-1]))
            assert out.abs().mean() > 1e3
        assert 3e5 < largest < 3e6  # of the Gauss-Newton part; DESIGN: Hopper's H has 4e5 to 1.3e6
        calls = record(monkeypatch, script, "target_weights")
        extra = (0.2,) if script is stsac else ()

        def leads(lam, **flags):
            results = []
            for (actor, critic, target_critic), data in ((nets, batch), (wide, wide_batch)):
                drawn = iter(noise)
                monkeypatch.setattr(torch, "randn_like", lambda t, drawn=drawn: next(drawn).to(t.dtype))
                args = script.Args(**flags)
                *_, grad_theta, _, _ = script.actor_leads(actor, critic, target_critic, data, *extra, lam, args)
                results.append((calls[-1][1][0], vector(grad_theta)))
            return *results, largest / lam

        return leads

    def test_gauss_newton(self, leads):
        """K has rounding errors of eps · λ_max, so (K + λB/2)⁻¹ has relative ones of at most κ · eps times a few.

        κ = λ_max/λ ≈ 1.1e3 and eps = 1.2e-7: κ · eps = 1.4e-4, and the forward pass through sums of 256 adds a factor
        of at most √256. Measured: 2e-5 in the weights, 1e-5 in the gradient.
        """
        (weights, gradient), (expected_weights, expected_gradient), condition = leads(500.0, curvature="gauss-newton")
        tolerance = 4 * condition * torch.finfo(torch.float32).eps
        assert tolerance < 1e-3
        assert relative_error(weights, expected_weights) < tolerance
        assert relative_error(gradient, expected_gradient) < tolerance

    @pytest.mark.parametrize("lam", [0.02, 1e-30])
    def test_gauss_newton_with_a_decayed_lam(self, leads, lam):
        """500 exp(-10) after 1e6 steps with --lam-decay 1e5: κ · eps > 1, so nothing is promised by conditioning.

        But K itself has full rank in such a batch (least eigenvalue 650 against λ_max 6e5). Measured: 4e-5, 2e-5.
        """
        (weights, gradient), (expected_weights, expected_gradient), _ = leads(lam, curvature="gauss-newton")
        assert weights.isfinite().all() and gradient.isfinite().all()
        assert relative_error(weights, expected_weights) < 1e-3
        assert relative_error(gradient, expected_gradient) < 1e-3

    def test_hessian(self, leads):
        """With M of relative error κ · eps on each of up to ten iterations. Measured: 3e-4 in the weights, 5e-4."""
        (weights, gradient), (expected_weights, expected_gradient), condition = leads(500.0)
        tolerance = 40 * condition * torch.finfo(torch.float32).eps
        assert tolerance < 1e-2
        assert relative_error(weights, expected_weights) < tolerance
        assert relative_error(gradient, expected_gradient) < tolerance

    @pytest.mark.parametrize("lam", [0.02, 1e-6, 1e-12, 1e-20, 1e-30])
    def test_hessian_with_a_decayed_lam(self, leads, lam):
        """(r - 𝒥ᵀ(K + λB/2)⁻¹𝒥r)/λ cancels and then divides by λ: without a bound on λ it is rounding alone, 10 to
        1e5 times too large, and what conjugate gradient falls back to at negative curvature (H is indefinite here)."""
        (weights, gradient), _, _ = leads(lam)
        (gauss_newton, _), _, _ = leads(500.0, curvature="gauss-newton")
        assert weights.isfinite().all() and gradient.isfinite().all()
        assert weights.norm() < 1.2 * gauss_newton.norm()


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
            policy = [nets[0]] if script is stddpg else []
            inputs = nets[0], nets[1], nets[-1], *policy, batches[0], *rest
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
        """One line, exit code 2 and no run folder."""
        env = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        env["PYTHONPATH"] = str(Path(__file__).parent)
        run = small_args(stddpg, compile=True, total_timesteps=110)
        code, out, err = finish(command(*flags(run), cwd=tmp_path, script=stddpg.__file__, env=env))
        assert code == 2 and out == "" and err.count("\n") == 1
        assert "--compile needs a working C++ compiler: " in err
        assert not (tmp_path / "runs").exists()

    def test_a_compiler_that_fails(self, script, monkeypatch, capsys):
        """Whatever torch raises, and however long its message."""

        def broken(function, **kwargs):
            def fail(*inputs):
                raise RuntimeError("\nfirst line\nsecond line")

            return fail

        monkeypatch.setattr(torch, "compile", broken)
        with pytest.raises(SystemExit) as error:
            script.train(run_args(script, compile=True))
        message = capsys.readouterr().err
        assert error.value.code == 2 and message.count("\n") == 1 and message.rstrip().endswith("first line")


class TestFlags:
    @pytest.mark.parametrize(
        "line, reason",
        [
            (["--curvature", "gauss-newton", "--leader", "critic"], "which is no sum of squares"),
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
        *_, grad_theta, _, info = Game(script).actor_leads(0.0, lam=0.0, cg_iters=5)
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
