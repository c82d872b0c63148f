"""What only a GPU can show. `benchmark/gpu.sh` runs it on one; by hand: python -m pytest tests/test_gpu.py

Without a GPU the tests are skipped. GPU_TEST_DEVICE=cpu runs them on the CPU all the same, to see that they run at all.
"""

import copy
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401  before a test patches torch.compiler.is_compiling

import stac_ac
import stddpg
import stsac

ROOT = Path(__file__).parent.parent
DEVICE = os.environ.get("GPU_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(),
    reason="needs a GPU; GPU_TEST_DEVICE=cpu python -m pytest tests/test_gpu.py runs it on the CPU",
)

OBSERVATIONS = gym.spaces.Box(-np.inf, np.inf, (5,))
ACTIONS = gym.spaces.Box(-1.0, 1.0, (2,))
PLAYERS = {
    "none": {"leader": "none"},
    "gauss-newton": {"leader": "actor", "curvature": "gauss-newton"},
    "preconditioned": {"leader": "actor", "curvature": "hessian"},
    "plain": {"leader": "actor", "curvature": "hessian", "precondition": False},
    "critic": {"leader": "critic"},
}


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def game(script, device="cpu"):
    """Networks of the script and a batch, the same on every device."""
    torch.manual_seed(1)
    actor = script.Actor(OBSERVATIONS, ACTIONS, (16, 16))
    critic = script.Critic(OBSERVATIONS, ACTIONS, (16, 16))
    targets = [copy.deepcopy(critic).requires_grad_(False)]
    if script is stddpg:
        targets.insert(0, copy.deepcopy(actor).requires_grad_(False))
    nets = [net.double().to(device) for net in (actor, critic, *targets)]
    obs, next_obs = torch.randn(2, 32, 5)
    actions = 2 * torch.rand(32, 2) - 1
    batch = script.Batch(obs, actions, torch.randn(32), next_obs, (torch.rand(32) < 0.1).double())
    return nets, script.Batch(*(column.to(device) for column in batch))


def coefficients(script, device):
    """alpha (stsac alone) and λ."""
    lam = torch.full((), 5.0, device=device)
    return (torch.full((), 0.2, device=device), lam) if script is stsac else (lam,)


def same_noise(monkeypatch):
    """The policy's noise is drawn on the CPU, so that both devices see the same."""

    def randn_like(x):
        return torch.randn(x.shape, dtype=x.dtype).to(x.device)

    monkeypatch.setattr(stsac.torch, "randn_like", randn_like)


@pytest.mark.parametrize("name", PLAYERS)
@pytest.mark.parametrize("script", [stddpg, stsac])
def test_gradients_are_those_of_the_cpu(script, name, monkeypatch):
    same_noise(monkeypatch)
    args = script.Args(**PLAYERS[name], cg_iters=50, cg_tol=1e-12)
    found = []
    for device in ("cpu", DEVICE):
        nets, batch = game(script, device)
        torch.manual_seed(2)
        _, _, grad_theta, grad_w, _ = script.player_gradients(*nets, batch, *coefficients(script, device), args)
        found.append(script.flatten([*grad_theta, *grad_w]).cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("leader", ["none", "actor"])
@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_on_policy_update_is_that_of_the_cpu(leader, curvature):
    args = stac_ac.Args(leader=leader, curvature=curvature, lam=5.0, cg_iters=50, cg_tol=1e-12)
    found = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(1)
        actor = stac_ac.Actor(OBSERVATIONS, ACTIONS, (8,)).double()
        critic = stac_ac.Critic(OBSERVATIONS, hidden=(8,)).double()
        obs, next_obs = torch.randn(2, 40, 5)
        trajectory = torch.arange(40) // 10
        columns = obs, torch.randn(40, 2), torch.randn(40), next_obs, torch.zeros(40), trajectory
        batch = stac_ac.Rollout(*(column.to(device) for column in columns))
        players = [actor.to(device), critic.to(device)]
        optimizers = [torch.optim.SGD(player.parameters(), lr=0.1) for player in players]
        stac_ac.stackelberg_update(*players, *optimizers, batch, args.lam, args)
        found.append(stac_ac.flatten([p for player in players for p in player.parameters()]).detach().cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def systems():
    """Matrices that conjugate gradient meets, and some that it had better not meet."""
    torch.manual_seed(3)
    root = torch.randn(20, 20)
    definite = root @ root.T + torch.eye(20)
    broken = definite.clone()
    broken[3, 4] = torch.nan
    return {
        "definite": definite,
        "indefinite": definite - 20 * torch.eye(20),
        "singular": root[:, :5] @ root[:, :5].T,
        "negative": -definite,
        "zero": torch.zeros(20, 20),
        "not finite": broken,
    }


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("name", systems())
def test_solver_is_that_of_the_cpu(name, preconditioned, monkeypatch):
    """With the early stop and with the masks that compiling uses."""
    A = systems()[name]
    b = torch.linspace(-1, 1, 20)
    found = []
    for device, masks in (("cpu", False), (DEVICE, False), (DEVICE, True)):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda masks=masks: masks)
        matrix = A.to(device)
        diagonal = matrix.diagonal().abs() + 1
        M = (lambda r, d=diagonal: r / d) if preconditioned else None
        x, info = stsac.conjugate_gradient(lambda v, matrix=matrix: matrix @ v, b.to(device), 60, 1e-10, M)
        found.append([x.cpu(), *(info[key].cpu().double() for key in ("residual", "negative_curvature"))])
    for other in found[1:]:
        torch.testing.assert_close(other[0], found[0][0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(other[1], found[0][1], rtol=1e-2, atol=1e-9)
        assert other[2] == found[0][2]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", PLAYERS)
@pytest.mark.parametrize("script", [stddpg, stsac])
def test_compiled_update_never_waits_for_the_host(script, name, graphs):
    """CUDA raises where a value is read back to the host."""
    args = script.Args(**PLAYERS[name], cg_iters=2)
    nets, batch = game(script, DEVICE)
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3, fused=True) for net in nets[:2]]
    torch._dynamo.reset()
    torch._dynamo.config.trace_autograd_ops = True
    options = {"fallback_random": True, "triton.cudagraphs": graphs}
    gradients = torch.compile(script.player_gradients, fullgraph=True, options=options)

    def update():
        return script.stackelberg_update(nets, optimizers, [batch], *coefficients(script, DEVICE), args, gradients)

    for _ in range(3):  # compiles, and records the graph
        update()
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        f_actor, f_critic, _ = update()
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(f_actor + f_critic)


@pytest.mark.parametrize("name", ["none", "gauss-newton"])
@pytest.mark.parametrize("script", [stddpg, stsac])
def test_cuda_graphs_change_no_number(script, name):
    """Parameters after some updates, compiled with and without: a graph that reads old memory would show."""
    args = script.Args(**PLAYERS[name], cg_iters=2)
    found = []
    for graphs in (False, True):
        nets, batch = game(script, DEVICE)
        optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3, fused=True) for net in nets[:2]]
        torch._dynamo.reset()
        torch._dynamo.config.trace_autograd_ops = True
        options = {"fallback_random": True, "triton.cudagraphs": graphs}
        gradients = torch.compile(script.player_gradients, fullgraph=True, options=options)
        torch.manual_seed(5)
        for k in range(10):
            half = script.Batch(*(column[k : k + 16].clone() for column in batch))  # another one each time
            script.stackelberg_update(nets, optimizers, [half], *coefficients(script, DEVICE), args, gradients)
        found.append(script.flatten([p for net in nets[:2] for p in net.parameters()]).detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("script", ["stddpg", "stsac", "stac_ac"])
def test_a_killed_run_is_carried_on_bit_for_bit(script, tmp_path):
    torch.set_default_dtype(torch.float32)
    flags = {
        "stac_ac": "--num-steps 100 --total-timesteps 800 --checkpoint-every 100 --unroll 2",
        "stddpg": "--total-timesteps 400 --start-steps 50 --update-after 50 --checkpoint-every 40 --eval-every 1000",
    }
    flags["stsac"] = flags["stddpg"]
    cuda = "--cuda" if DEVICE == "cuda" else "--no-cuda"
    line = [sys.executable, ROOT / f"{script}.py", "--env-id", "point_env:Point-v0", "--save-model", cuda]
    line += flags[script].split()
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}
    whole = [*line, "--run-dir", tmp_path / "whole"]
    subprocess.run(whole, env=environment, check=True)
    parts = [*line, "--run-dir", tmp_path / "parts"]
    killed = subprocess.run(parts, env=environment | {"POINT_KILL_AT": "300"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "parts/checkpoint.pt").exists()
    carried_on = subprocess.run(parts, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert f", {DEVICE}, from step " in carried_on and ", from step 0:" not in carried_on
    models = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "parts")]
    for player in ("actor", "critic"):
        for name, p in models[0][player].items():
            assert torch.equal(p, models[1][player][name]), name


@pytest.mark.parametrize("script", [stddpg, stsac])
def test_everything_of_a_run_is_on_the_device(script, tmp_path):
    torch.set_default_dtype(torch.float32)
    args = script.Args(env_id="point_env:Point-v0", total_timesteps=60, start_steps=20, update_after=20, hidden=(16,))
    args = replace(args, run_dir=str(tmp_path / "run"), cuda=DEVICE == "cuda", batch_size=10)
    seen = set()
    update = script.stackelberg_update

    def noticing(nets, optimizers, batches, *rest):
        for net in nets:
            seen.update(p.device.type for p in net.parameters())
        seen.update(column.device.type for column in batches[0])
        return update(nets, optimizers, batches, *rest)

    script.stackelberg_update = noticing
    try:
        script.train(args)
    finally:
        script.stackelberg_update = update
    assert seen == {torch.device(DEVICE).type}
