"""Updates per second of stddpg.py and stsac.py, side by side on one machine.

    python benchmark/throughput.py runs/sac/checkpoint.pt                   # leaders, curvatures, eager and compiled
    python benchmark/throughput.py runs/sac/checkpoint.pt --cuda --sb3      # on a GPU, beside Stable-Baselines3
    python benchmark/throughput.py NEW/checkpoint.pt --against OLD_CHECKOUT --against-checkpoint OLD/checkpoint.pt

What a Stackelberg update costs depends on the state of training, so every contestant starts from one checkpoint and
draws its batches from the replay buffer in it. An update is what `train` does at a step: it draws a batch, calls
`stackelberg_update` and looks at the losses. The contestants take turns, because a machine's speed drifts; a first
turn of each is not counted. The table has medians and ranges over the rounds; a ratio is the median of the rounds'.
"""

import importlib.util
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    checkpoints: tyro.conf.Positional[tuple[Path, ...]]  # of runs of stddpg.py or stsac.py
    updates: int = 200  # updates of one turn
    rounds: int = 5  # turns of each contestant
    batch_size: int = 100  # samples of a batch
    cuda: bool = False  # on a GPU
    eager: bool = True  # with the contestants that are not compiled
    compile: bool = True  # with the compiled contestants
    cuda_graphs: bool = False  # with the compiled contestants once more, captured in CUDA graphs by the compiler
    sb3: bool = False  # with Stable-Baselines3's DDPG and SAC: the same networks and batch
    only: tuple[str, ...] = ()  # contestants by name (default: all)
    profile: Path | None = None  # a file for a profile of one update of each contestant
    against: Path | None = None  # a folder with another version of the scripts, which takes turns with these
    against_checkpoint: Path | None = None  # a checkpoint of that version (default: the first one)


HESSIAN = {"leader": "actor", "curvature": "hessian", "cg_iters": 10}
# name, flags of an eager and of a compiled contestant (a compiled solve takes all of its iterations)
CONTESTANTS = {
    "none": ({"leader": "none"}, {}),
    "actor, Gauss-Newton": ({"leader": "actor", "curvature": "gauss-newton"}, {}),
    "actor, Hessian, preconditioned": (HESSIAN | {"precondition": True, "cg_tol": 0.01}, {"cg_iters": 2}),
    "actor, Hessian, plain, 10 products": (HESSIAN | {"precondition": False, "cg_tol": 0.0}, {}),
    "critic": ({"leader": "critic", "cg_iters": 10, "cg_tol": 0.01}, {"cg_iters": 2}),
}


class Contestant(NamedTuple):
    script: str
    name: str
    mode: str  # eager, compiled, CUDA graphs
    update: object  # a function without arguments that returns the number of iterations


def load_script(name, folder):
    """The script `name` of a folder, as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"{name} in {folder}", folder / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    return script


def training_update(script, state, flags, mode, args):
    """One update of a run that is carried on from the checkpoint `state`, as a function."""
    known = {name: value for name, value in state["args"].items() if name in script.Args.__dataclass_fields__}
    run_args = replace(script.Args(**known), batch_size=args.batch_size, **flags)
    device = torch.device("cuda" if args.cuda else "cpu")
    env = gym.wrappers.FlattenObservation(gym.make(run_args.env_id))
    spaces = env.observation_space, env.action_space
    nets = []
    for name in ("actor", "critic", "target_actor", "target_critic"):
        if name in state:
            net = (script.Actor if "actor" in name else script.Critic)(*spaces, run_args.hidden).to(device)
            net.load_state_dict(state[name], strict=False)
            nets.append(net.requires_grad_("target" not in name))
    optimizers = [torch.optim.Adam(net.parameters(), lr=1e-3, fused=True) for net in nets[:2]]
    size = len(state["buffer"]["data"][0])  # `count` goes on when a buffer is full
    buffer = script.ReplayBuffer(size, *spaces, device)
    buffer.load_state_dict(state["buffer"] | {"count": size})

    gradients = script.player_gradients
    if mode != "eager":
        torch._dynamo.config.trace_autograd_ops = True
        options = {"fallback_random": True, "triton.cudagraphs": mode == "CUDA graphs"}
        gradients = torch.compile(gradients, fullgraph=True, options=options)
    lam = torch.full((), 500.0, device=device)
    coefficients = (torch.full((), 0.2, device=device), lam) if script.ALGORITHM == "stsac" else (lam,)

    def update():
        batches = [buffer.sample(args.batch_size)]
        f_actor, f_critic, info = script.stackelberg_update(
            nets, optimizers, batches, *coefficients, run_args, gradients
        )
        if not (f_actor + f_critic).isfinite():  # `train` looks as well, so a GPU waits here
            raise FloatingPointError("a loss is not finite")
        return info.get("iterations", torch.tensor(torch.nan)).clone()  # a CUDA graph overwrites what it returned

    return update


def stable_baselines_update(state, args):
    """One update of Stable-Baselines3's plain algorithm, with the same networks, batch and transitions."""
    import stable_baselines3

    name = {"stsac": "SAC", "stddpg": "DDPG"}[state["algorithm"]]
    flags = {"ent_coef": 0.2} if name == "SAC" else {}
    model = getattr(stable_baselines3, name)(
        "MlpPolicy",
        state["args"]["env_id"],
        learning_rate=1e-3,
        batch_size=args.batch_size,
        buffer_size=len(state["buffer"]["data"][0]),
        policy_kwargs={"net_arch": list(state["args"]["hidden"])},
        device="cuda" if args.cuda else "cpu",
        seed=1,
        **flags,
    )
    model.set_logger(stable_baselines3.common.logger.configure(None, []))
    for obs, action, reward, next_obs, terminated in zip(*(column.numpy() for column in state["buffer"]["data"])):
        model.replay_buffer.add(obs, next_obs, action, reward, terminated, [{}])

    def update():
        model.train(gradient_steps=1, batch_size=args.batch_size)
        return torch.tensor(torch.nan)

    return update


def contestants(args):
    """All that take turns."""
    modes = ["eager"] * args.eager + ["compiled"] * args.compile + ["CUDA graphs"] * args.cuda_graphs
    versions = [(path, "", ROOT) for path in args.checkpoints]
    if args.against is not None:
        path = args.against_checkpoint or args.checkpoints[0]
        versions.append((path, " before", args.against.resolve()))
    found = []
    for mode in modes:
        for name, (flags, compiled_flags) in CONTESTANTS.items():
            for path, version, folder in versions:  # two versions of one contestant one after the other
                if args.only and name not in args.only:
                    continue
                state = torch.load(path, map_location="cpu", weights_only=True)
                script = load_script(state["algorithm"], folder)
                flags_of_mode = flags if mode == "eager" else flags | compiled_flags
                update = training_update(script, state, flags_of_mode, mode, args)
                found.append(Contestant(state["algorithm"] + version, name, mode, update))
    for path in args.checkpoints if args.sb3 else ():
        state = torch.load(path, map_location="cpu", weights_only=True)
        try:
            update = stable_baselines_update(state, args)
        except ImportError as e:
            print(f"without Stable-Baselines3: {e}", file=sys.stderr)
            break
        found.append(Contestant(state["algorithm"], "Stable-Baselines3", "eager", update))
    return found


def turn(contestant, args):
    """Updates per second, and the mean number of conjugate gradient iterations."""
    iterations = []
    start = time.perf_counter()
    for _ in range(args.updates):
        iterations.append(contestant.update())
    if args.cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return args.updates / seconds, torch.stack(iterations).double().mean().item()


def print_table(found, speed, iterations, args):
    """A row for each contestant; ratios are to `none` of the same script and mode, and before a change."""
    row = {(contestant.script, contestant.name, contestant.mode): i for i, contestant in enumerate(found)}
    print(f"| script | leader, curvature | mode | updates/s: median (range over {args.rounds}) ", end="")
    print("| ratio to none | ratio to before | CG iterations |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for i, (script, name, mode, _) in enumerate(found):
        cells = [script, name, mode]
        cells.append(f"{np.median(speed[:, i]):.0f} ({speed[:, i].min():.0f} to {speed[:, i].max():.0f})")
        for other in ((script, "none", mode), (f"{script} before", name, mode)):
            ratios = speed[:, i] / speed[:, row[other]] if other in row else None
            cells.append(
                "" if ratios is None else f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
            )
        mean = iterations[:, i].mean()
        cells.append("" if np.isnan(mean) else f"{mean:.1f}")
        print("| " + " | ".join(cells) + " |", flush=True)


def print_profiles(found, args):
    """What one update of each contestant does: calls, time on the CPU and on the device."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with open(args.profile, "w") as file:
        for contestant in found:
            with torch.profiler.profile(activities=activities) as profiler:
                contestant.update()
            table = profiler.key_averages().table(
                sort_by="self_cuda_time_total" if args.cuda else "self_cpu_time_total", row_limit=15
            )
            print(f"# {contestant.script}, {contestant.name}, {contestant.mode}\n{table}", file=file)


def main():
    args = tyro.cli(Args, description=__doc__)
    if args.cuda and not torch.cuda.is_available():
        raise SystemExit("throughput.py: error: --cuda needs a GPU")
    torch.set_num_threads(1)
    device = torch.cuda.get_device_name() if args.cuda else "CPU, one thread"
    print(f"{device}, batch {args.batch_size}, {args.checkpoints[0]}\n")
    found = []
    for contestant in contestants(args):
        try:
            turn(contestant, args)  # compiles, and fills caches
            found.append(contestant)
        except (Exception, SystemExit) as e:  # one that fails, or that a script refuses, does not take the others along
            print(
                f"{contestant.script}, {contestant.name}, {contestant.mode}: {type(e).__name__}: {e}", file=sys.stderr
            )
    if not found:
        raise SystemExit("throughput.py: error: no contestant is left")
    results = []
    for _ in range(args.rounds):
        results.append([turn(contestant, args) for contestant in found])
    speed, iterations = np.array(results).transpose(2, 0, 1)
    print_table(found, speed, iterations, args)
    if args.profile is not None:
        print_profiles(found, args)


if __name__ == "__main__":
    main()
