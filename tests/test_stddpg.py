"""What is particular to stddpg.py."""

import pytest
import torch
from game import Game, first, positive_definite_lam, second, solve, vector
from torch.func import functional_call, jvp

import stddpg


@pytest.mark.parametrize("seed", range(2))
def test_implicit_term_as_weighted_targets(seed):
    """The actor also climbs its own influence on the targets: Σ_i stopgrad(dJ/dy_i) y_i(θ).

    L depends on θ through the targets alone. When the critic re-fits, target y_i moves J by
    dJ/dy_i = (2/B) ∇_wQ_w(s_i, a_i)·v with v = (∇_w²L + λI)⁻¹ ∇_wJ. In forward mode: no second backward through L.
    """
    game = Game(stddpg, seed=seed)
    direct, grad2_f1, _, hessian = game.dense()
    lam = positive_definite_lam(hessian)
    v = solve(hessian, lam, -grad2_f1).split([p.numel() for p in game.w])
    w = {name: p.detach() for name, p in game.critic.named_parameters()}
    parts = {name: part.view_as(p) for part, (name, p) in zip(v, w.items())}
    _, Jv = jvp(lambda w: functional_call(game.critic, w, (game.batch.obs, game.batch.actions)), (w,), (parts,))
    dJ_dy = 2 / len(Jv) * Jv
    climbs = first(dJ_dy @ game.costs().y, game.theta)
    total = vector(game.gradients(lam)[2])
    # costs, so J's gradients have a minus; both ways differ by rounding alone
    assert (total - (direct - climbs)).norm() < 1e-10 * climbs.norm()
    assert climbs.norm() > 1e-3 * direct.norm()


@pytest.mark.parametrize("activation", [torch.nn.ReLU, torch.nn.Tanh])
def test_critic_as_leader_has_no_gauss_newton_part(activation):
    """∇²_θ(-J) = -E[(∂μ)ᵀ ∇²_aQ ∂μ] - E[∇_aQ · ∂²μ]: with a ReLU critic ∇²_aQ = 0 and only the second part is left."""
    game = Game(stddpg, seed=1)
    game.critic.q1[1] = game.critic.q1[3] = activation()
    hessian = game.dense("critic")[3]
    actions = game.actor(game.batch.obs)
    constant = actions.detach().requires_grad_()
    (dQ_da,) = torch.autograd.grad(game.critic(game.batch.obs, constant).sum(), constant)
    linearized = -(dQ_da * actions).sum(-1).mean()  # -J with Q replaced by its linear part at these actions
    gauss_newton = hessian - second(first(linearized, game.theta, create_graph=True), game.theta)
    if activation is torch.nn.ReLU:
        assert gauss_newton.norm() < 1e-14 * hessian.norm()
        eigenvalues = torch.linalg.eigvalsh(hessian)  # so the follower's Hessian has no definite part to rely on
        assert eigenvalues[0] < -1e-3 * hessian.norm()
        assert eigenvalues[-1] > 1e-3 * hessian.norm()
    else:
        assert gauss_newton.norm() > 1e-2 * hessian.norm()
