"""What is particular to stddpg.py."""

import pytest
import torch
from game import GAMMA, Game, first, positive_definite_lam, second, solve, vector
from runs import args, run_main, scalars
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


def test_target_policy_takes_theta_out_of_the_target(here, monkeypatch):
    """With DDPG's target actor L does not depend on θ: another run, and one that cannot have a leader."""
    game = Game(stddpg)
    game.target_actor.net[-1].bias.data += 0.1
    plain, changed = (game.gradients(5.0, leader="none", target_policy=value) for value in (False, True))
    expected = stddpg.td_target(game.target_actor, game.target_critic, game.batch, GAMMA)
    torch.testing.assert_close(changed[4]["y"], expected, rtol=0, atol=0)
    assert not torch.equal(plain[4]["y"], expected)
    for leader in ("actor", "critic"):
        with pytest.raises(SystemExit, match="it needs --leader none"):
            run_main(stddpg, monkeypatch, "--target-policy", "--leader", leader)
    runs = [stddpg.train(args(stddpg, leader="none", target_policy=value)) for value in (False, True)]
    losses = [scalars(run_dir)["losses/qf1_loss"][100] for run_dir in runs]
    assert losses[0] != losses[1]


def test_exploration_noise_is_in_half_widths_of_the_box(here):
    """A standard deviation of 0.5 is a quarter of the box, whatever its units; Narrow's half width is 1/16."""
    for noise in (0.0, 0.5):
        run = args(stddpg, exploration_noise=noise, total_timesteps=400, start_steps=0, update_after=500)
        run.env_id = "point_env:Narrow-v0"
        run_dir = stddpg.train(run)
        state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        obs, actions, *_ = state["buffer"]["data"]
        env = stddpg.make_env(run.env_id)
        actor = stddpg.Actor(env.observation_space, env.action_space, run.hidden)
        actor.load_state_dict(state["actor"])
        found = actions - actor(obs).detach()  # 800 numbers
        assert found.std().item() == pytest.approx(noise / 16, rel=0.1, abs=1e-6)
        assert found.mean().item() == pytest.approx(0, abs=5 * noise / 16 / 800**0.5 + 1e-6)
