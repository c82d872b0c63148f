"""How good each way to solve for the actor-leader's implicit term is, on checkpoints of real runs.

    python benchmark/curvature.py runs/Hopper-v4__stddpg-al__1__1700000000 runs/Walker2d-v4__stsac-al__1__1700000001

For each run, `--batches` minibatches are drawn from its replay buffer. All is solved in float64, so that only the
methods differ. The exact solution is preconditioned conjugate gradient to a residual of 1e-10; where that meets
negative curvature, ∇_w²L + λI is indefinite, the critic has no best response, and there is nothing to compare with.
Over the other batches, the table has the median (and the range) of the implicit term's error,
‖approximate - exact‖/‖exact‖, of its cosine with the exact one, and of the solve's relative residual; over all batches,
the number of those in which the solve itself met negative curvature, and how often three preconditioned products left a
larger residual than three plain ones.
"""

import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs of stddpg.py or stsac.py with a checkpoint"""
    batches: int = 20
    """minibatches of each run"""
    lam: float = 500.0
    """λ"""


SOLVES = {  # changes to the script's own Args; a preconditioned solve takes one product more than iterations
    "Gauss-Newton": {"curvature": "gauss-newton"},
    "preconditioned, 1 product": {"cg_iters": 0},
    "preconditioned, 2 products": {"cg_iters": 1},
    "preconditioned, 3 products": {"cg_iters": 2},
    "plain, 3 products": {"precondition": False, "cg_iters": 3},
    "plain, 10 products": {"precondition": False, "cg_iters": 10},
}


def load(run):
    """A run's script, Args, networks in float64 (actor, critic, target critic), replay buffer and step."""
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    script = importlib.import_module(state["algorithm"])
    args = script.Args(**{name: value for name, value in state["args"].items() if hasattr(script.Args, name)})
    env = gym.wrappers.FlattenObservation(gym.make(args.env_id))
    spaces, nets = (env.observation_space, env.action_space), []
    for name in ("actor", "critic", "target_critic"):
        net = (script.Actor if name == "actor" else script.Critic)(*spaces, args.hidden)
        net.load_state_dict(state[name])
        nets.append(net.double().requires_grad_(name != "target_critic"))
    size = len(state["buffer"]["data"][0])  # `count` goes on when a buffer is full
    buffer = script.ReplayBuffer(size, *spaces, "cpu")
    buffer.load_state_dict({"data": state["buffer"]["data"], "count": size})
    if getattr(args, "autotune", False):
        args = replace(args, alpha=state["log_alpha"]["0"].exp().item())
    args = replace(args, leader="actor", curvature="hessian", precondition=True, cg_tol=0.0)
    return script, args, nets, buffer, state["global_step"]


def implicit_term(script, nets, batch, lam, args, seed):
    """The implicit term, flat, and the solver's info."""
    alpha = (args.alpha,) if script.__name__ == "stsac" else ()
    actor, critic, target_critic = nets
    target_actor = () if script.__name__ == "stsac" else (actor,)  # what an actor that leads has no use for
    torch.manual_seed(seed)
    _, _, total, _, info = script.player_gradients(
        actor, critic, *target_actor, target_critic, batch, *alpha, lam, args
    )
    torch.manual_seed(seed)  # the same noise in the policy
    direct = script.grad(script.actor_loss(*nets[:2], batch, *alpha), list(nets[0].parameters()))
    return script.flatten(total) - script.flatten(direct), info


def summary(values):
    """Median and range, two digits."""
    values = np.array(values)
    if np.isnan(values).all():
        return ""
    return f"{np.median(values):.2g} ({values.min():.2g} to {values.max():.2g})"


def main():
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(1)
    print("| run | step | indefinite | solve | error | cosine | residual | met negative curvature |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for run in args.runs:
        script, run_args, nets, buffer, step = load(run)
        table, met, indefinite, worse = {name: [] for name in SOLVES}, dict.fromkeys(SOLVES, 0), 0, 0
        for k in range(args.batches):
            torch.manual_seed(k)
            batch = buffer.sample(run_args.batch_size)
            batch = type(batch)(*(column.double() for column in batch))
            to_the_end = replace(run_args, cg_iters=1000, cg_tol=1e-10)
            exact, info = implicit_term(script, nets, batch, args.lam, to_the_end, k)
            no_best_response = bool(info["negative_curvature"])
            indefinite += no_best_response
            if not no_best_response and info["residual"] > 1e-9:
                print(f"batch {k}: not solved, relative residual {info['residual']:.1e}", file=sys.stderr)
            residuals = {}
            for name, changes in SOLVES.items():
                got, info = implicit_term(script, nets, batch, args.lam, replace(run_args, **changes), k)
                met[name] += int(info.get("negative_curvature", 0))
                residuals[name] = float(info.get("residual", float("nan")))
                if not no_best_response:
                    cosine = torch.nn.functional.cosine_similarity(got, exact, dim=0)
                    table[name].append([((got - exact).norm() / exact.norm()).item(), cosine.item(), residuals[name]])
            worse += residuals["preconditioned, 3 products"] > residuals["plain, 3 products"]
        for name, values in table.items():
            cells = [summary(column) for column in zip(*values)] if values else [""] * 3
            share = f"{met[name]}/{args.batches}"
            print(f"| {run.name} | {step:,} | {indefinite}/{args.batches} | {name} | {' | '.join(cells)} | {share} |")
        print(f"{run.name}: three preconditioned products are worse than three plain ones on {worse} batches\n")


if __name__ == "__main__":
    main()
