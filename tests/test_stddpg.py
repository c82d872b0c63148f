"""What is particular to stddpg.py."""

import pytest
import torch
from test_gradient import GAMMA, SPACES, Game, dense, positive_definite_lam, vector
from torch.func import functional_call, jvp

import stddpg


@pytest.mark.parametrize("seed", range(3))
def test_implicit_term_as_weighted_targets(seed):
    """The actor also climbs its own influence on the targets: Σ_i stopgrad(dJ/dy_i) y_i(θ).

    L depends on θ through the targets alone. When the critic re-fits, target y_i moves J by
    dJ/dy_i = (2/B) ∇_wQ_w(s_i, a_i)·v with v = (∇_w²L + λI)⁻¹ ∇_wJ. In forward mode: no second backward through L.
    """
    game = Game(stddpg, seed=seed)
    direct, grad2_f1, _, hessian = dense(game, "actor")
    lam = positive_definite_lam(hessian)
    total, info = game.stackelberg_gradient("actor", lam)
    v = torch.linalg.solve(hessian + lam * torch.eye(len(hessian), dtype=torch.float64), -grad2_f1)

    b = game.batch
    w = {name: p.detach() for name, p in game.critic.named_parameters()}
    parts = dict(zip(w, (x.view_as(p) for x, p in zip(v.split([p.numel() for p in game.w]), game.w))))
    _, Jv = jvp(lambda w: functional_call(game.critic, w, (b.obs, b.actions)), (w,), (parts,))
    dJ_dy = 2 / len(b.rewards) * Jv
    y = stddpg.td_target(game.actor, game.target_critic, b, GAMMA)
    climbs = vector(torch.autograd.grad(dJ_dy @ y, game.theta))
    # costs, so J's gradients have a minus; both ways differ by rounding alone
    assert (vector(total) - (direct - climbs)).norm() < 1e-10 * climbs.norm()
    assert info["implicit_norm"] > 1e-3 * info["direct_norm"]


@pytest.mark.parametrize("activation", [torch.nn.ReLU, torch.nn.Tanh])
def test_critic_as_leader_has_no_gauss_newton_part(activation):
    """∇²_θ(-J) = -E[(∂μ)ᵀ ∇²_aQ ∂μ] - E[∇_aQ · ∂²μ]: with a ReLU critic ∇²_aQ = 0 and only the second part is left."""
    game = Game(stddpg, seed=1)
    for layer, module in enumerate(game.critic.q1):
        if isinstance(module, torch.nn.ReLU):
            game.critic.q1[layer] = activation()
    hessian = dense(game, "critic")[3]
    actions = game.actor(game.batch.obs).detach().requires_grad_()
    (dQ_da,) = torch.autograd.grad(game.critic(game.batch.obs, actions).sum(), actions)

    def linearized(theta):  # -J with Q replaced by its linear part at these actions
        parts = [v.view_as(p) for v, p in zip(theta.split([p.numel() for p in game.theta]), game.theta)]
        names = [name for name, _ in game.actor.named_parameters()]
        return -(dQ_da * functional_call(game.actor, dict(zip(names, parts)), (game.batch.obs,))).sum(-1).mean()

    second = torch.autograd.functional.hessian(linearized, vector(game.theta))
    gauss_newton = hessian - second
    if activation is torch.nn.ReLU:
        assert gauss_newton.norm() < 1e-14 * hessian.norm()
        eigenvalues = torch.linalg.eigvalsh(hessian)  # so the follower's Hessian has no definite part to rely on
        assert eigenvalues[0] < -1e-3 * hessian.norm() and eigenvalues[-1] > 1e-3 * hessian.norm()
    else:
        assert gauss_newton.norm() > 1e-2 * hessian.norm()


def test_target_policy_takes_theta_out_of_the_target():
    """With a target actor L does not depend on θ, so neither leader has an implicit term."""
    game = Game(stddpg)
    target_actor = stddpg.Actor(*SPACES, (5, 4)).double()
    L = stddpg.critic_loss(target_actor, game.critic, game.target_critic, game.batch, GAMMA)
    for leader in ("actor", "critic"):
        name1, x1, name2, x2 = game.players(leader)
        costs = {"actor": game("actor"), "critic": L}
        total, info = stddpg.stackelberg_gradient(costs[name1], costs[name2], x1, x2, 5.0, 10, 0.0)
        assert info["implicit_norm"] == 0
        torch.testing.assert_close(list(total), list(torch.autograd.grad(costs[name1], x1, retain_graph=True)))
        assert game.stackelberg_gradient(leader, 5.0)[1]["implicit_norm"] > 0
