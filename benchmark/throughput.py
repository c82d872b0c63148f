"""Environment steps per second of training, side by side on one machine.

    python benchmark/throughput.py runs/Walker2d-v4__stddpg-al__1__1700000000 runs/Walker2d-v4__stsac-al__1__1700000001
    python benchmark/throughput.py RUN... --sb3      # with Stable-Baselines3's DDPG and SAC: pip install -e ".[sb3]"
    python benchmark/throughput.py RUN --against OLD_CHECKOUT --against-run OLD_RUN     # two versions of a script

A run is a folder with a checkpoint, because what a Stackelberg update costs depends on the state of training (early
on, conjugate gradient needs fewer iterations). From this one checkpoint every contestant carries on with `train` of the
run's script: leaders, curvatures, eager and compiled. The contestants take turns of `--steps` environment steps, each
with one update, in one process on one thread, because a machine's speed drifts. The first round is not counted. The
table has medians and ranges over the rounds; a ratio is the median of the ratios within a round.
"""

import importlib.util
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
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
    steps: int = 500
    """environment steps of one turn"""
    rounds: int = 5
    """turns of each contestant"""
    compile: bool = True
    """with the compiled contestants"""
    sb3: bool = False
    """with Stable-Baselines3's DDPG and SAC, the same batch, networks and rates"""
    against: Path | None = None
    """a folder with another version of the scripts, whose contestants take turns with these"""
    against_run: Path | None = None
    """a run of that version, best with the same state of training as RUN"""


GAUSS_NEWTON = {"leader": "actor", "curvature": "gauss-newton"}
HESSIAN = {"leader": "actor", "curvature": "hessian"}
CONTESTANTS = [  # what the table says, and the flags; a compiled solve takes all of its iterations
    ("none", "", False, {"leader": "none"}),
    ("actor", "Gauss-Newton", False, GAUSS_NEWTON),
    ("actor", "Hessian, preconditioned", False, HESSIAN),
    ("actor", "Hessian, preconditioned, --cg-tol 0.01", False, HESSIAN | {"cg_tol": 1e-2}),
    ("actor", "Hessian, the paper's plain CG", False, HESSIAN | {"precondition": False}),
    ("critic", "Hessian", False, {"leader": "critic"}),
    ("none", "", True, {"leader": "none"}),
    ("actor", "Gauss-Newton", True, GAUSS_NEWTON),
    ("actor", "Hessian, preconditioned, --cg-iters 2", True, HESSIAN | {"cg_iters": 2}),
    ("critic", "Hessian, --cg-iters 2", True, {"leader": "critic", "cg_iters": 2}),
]


def load_script(name, folder):
    """The script `name` in a folder, as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"{name} in {folder}", Path(folder) / f"{name}.py")
    sys.modules[spec.name] = script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


class Training(threading.Thread):
    """Training that is carried on from a checkpoint, `steps` steps at a time, on its own thread."""

    def __init__(self, run, folder, flags, steps, scripts):
        super().__init__(daemon=True)
        self.run_folder = run
        state = torch.load(run / "checkpoint.pt", weights_only=True)
        never = {"total_timesteps": 10**9, "eval_every": 10**9, "checkpoint_every": 10**9, "save_model": False}
        defaults = {"curvature": "hessian", "precondition": True, "cg_iters": 10, "cg_tol": 1e-3}
        self.script = load_script(state["algorithm"], scripts)
        state["args"] |= defaults | flags | never
        torch.save(state, folder / "checkpoint.pt")
        self.args = self.script.Args(**state["args"] | {"resume": str(folder)})
        self.steps, self.count, self.iterations = steps, 0, []
        self.go, self.done = threading.Event(), threading.Event()
        self.update = self.script.stackelberg_update

    def run(self):
        self.go.wait()
        self.script.train(self.args)

    def counted_update(self, *inputs):
        """One update; at a turn's end the others have theirs first."""
        if self.count and self.count % self.steps == 0:
            self.go.clear()
            self.done.set()
            self.go.wait()
        self.count += 1
        result = self.update(*inputs)
        self.iterations.append(float(result[2].get("iterations", np.nan)))
        return result

    def turn(self):
        """Steps per second, and the mean number of conjugate gradient iterations."""
        self.script.stackelberg_update = self.counted_update
        self.iterations = []
        start = time.perf_counter()
        self.done.clear()
        self.go.set()
        if not self.is_alive():
            self.start()
        while not self.done.wait(1):
            if not self.is_alive():
                raise SystemExit(f"{self.args.resume} has stopped")
        return self.steps / (time.perf_counter() - start), np.mean(self.iterations)


class StableBaselines:
    """Stable-Baselines3's plain algorithm with the same batch, networks and learning rates."""

    def __init__(self, algorithm, env_id, steps):
        import stable_baselines3

        same = {"learning_rate": 1e-3, "batch_size": 100, "learning_starts": 100, "train_freq": 1, "gradient_steps": 1}
        if algorithm == "SAC":
            same["ent_coef"] = 0.2
        kwargs = {"net_arch": [256, 256]}
        self.model = getattr(stable_baselines3, algorithm)(
            "MlpPolicy", gym.make(env_id), policy_kwargs=kwargs, device="cpu", seed=1, **same
        )
        self.steps = steps

    def turn(self):
        start = time.perf_counter()
        self.model.learn(self.steps, reset_num_timesteps=False)
        return self.steps / (time.perf_counter() - start), np.nan


def main():
    args = tyro.cli(Args, description=__doc__)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    contestants, labels = [], []
    with tempfile.TemporaryDirectory() as folder:
        versions = [(run, "", Path(__file__).parent.parent) for run in args.runs]
        if args.against:
            versions.append((args.against_run, "before", args.against))
        for leader, curvature, compiled, flags in CONTESTANTS:
            for run, version, scripts in versions:  # two versions of one contestant, one after the other
                if compiled and not args.compile:
                    continue
                copy = Path(folder) / str(len(contestants))
                copy.mkdir()
                contestants.append(Training(run, copy, flags | {"compile": compiled}, args.steps, scripts))
                script = Path(contestants[-1].script.__file__).stem
                labels.append((f"{script} {version}".strip(), leader, curvature, compiled))
        for run in args.runs if args.sb3 else ():
            mine = next(contestant for contestant in contestants if contestant.run_folder == run)
            algorithm = mine.script.ALGORITHM.removeprefix("st").upper()
            contestants.append(StableBaselines(algorithm, mine.args.env_id, args.steps))
            labels.append((mine.script.ALGORITHM, "none", f"Stable-Baselines3's {algorithm}", False))
        results = []
        for k in range(args.rounds + 1):
            results.append([contestant.turn() for contestant in contestants])
            print(f"round {k} of {args.rounds}", file=sys.stderr)
    speed, iterations = np.array(results[1:]).transpose(2, 0, 1)
    reference = {label: i for i, label in enumerate(labels)}
    print(f"| script | leader | curvature | compiled | steps/s: median (range over {args.rounds}) ", end="")
    print("| ratio to `none` | to compiled `none` | CG iterations |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for i, (script, leader, curvature, compiled) in enumerate(labels):
        median = f"{np.median(speed[:, i]):.0f} ({speed[:, i].min():.0f} to {speed[:, i].max():.0f})"
        plain, compiled_plain = (reference.get((script, "none", "", c)) for c in (False, True))
        ratio = f"{np.median(speed[:, i] / speed[:, plain]):.2f}"
        ratio_compiled = f"{np.median(speed[:, i] / speed[:, compiled_plain]):.2f}" if compiled else ""
        cg = "" if np.isnan(iterations[:, i]).any() else f"{np.median(iterations[:, i]):.1f}"
        cells = script, leader, curvature, "yes" if compiled else "", median, ratio, ratio_compiled, cg
        print(f"| {' | '.join(cells)} |")
    for i, (script, *contestant) in enumerate(labels):
        before = reference.get((f"{script} before", *contestant))
        if before is not None:
            ratios = speed[:, i] / speed[:, before]
            name = ", ".join(
                str(part) for part in (script, *contestant[:2], "compiled" if contestant[2] else "eager") if part
            )
            print(f"{name}: {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}) of the speed before")


if __name__ == "__main__":
    main()
