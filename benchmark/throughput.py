"""Environment steps per second of training runs, side by side on one machine.

    python benchmark/throughput.py runs/Walker2d-v4__sac__1__1700000000 runs/Walker2d-v4__stsac-al__1__1700000001

Each contestant is the folder of a run with a checkpoint: what a Stackelberg update costs depends on the state of
training (early on, conjugate gradient needs two or three iterations; later all of its budget). A copy of the run is
carried on from its checkpoint for `--steps` steps. The contestants take turns, `--rounds` times, because a machine's
speed drifts; the table has the median and the range over the rounds, and the ratio to the first contestant, which is
the median of the ratios within a round.
"""

import importlib
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent.parent))


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs with a checkpoint; the first is the reference"""
    steps: int = 1_000
    """environment steps of one turn"""
    rounds: int = 5
    """turns of each contestant"""


def last(run_dir, tag):
    """The last value of a scalar in a run's TensorBoard files."""
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return events.Scalars(tag)[-1].value if tag in events.Tags()["scalars"] else float("nan")


def turn(run, steps):
    """Carries a copy of `run` on; returns its steps per second and mean CG iterations, and the step it started at."""
    state = torch.load(run / "checkpoint.pt", weights_only=True, mmap=True)
    script, start = importlib.import_module(state["algorithm"]), state["global_step"]
    changes = {"total_timesteps": start + steps, "eval_every": 10**9, "checkpoint_every": 10**9, "save_model": False}
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(run, Path(folder) / run.name)
        script.train(script.Args(**{**state["args"], **changes, "resume": str(copy)}))
        return last(copy, "charts/SPS"), last(copy, "stackelberg/cg_iterations"), start


def main():
    args = tyro.cli(Args, description=__doc__)
    results = np.array([[turn(run, args.steps) for run in args.runs] for _ in range(args.rounds)])
    speed, iterations, start = results.transpose(2, 0, 1)
    print(f"| run | from step | steps/s: median (range over {args.rounds}) | ratio to the first | CG iterations |")
    print("| --- | --- | --- | --- | --- |")
    for i, run in enumerate(args.runs):
        median, ratio = np.median(speed[:, i]), np.median(speed[:, i] / speed[:, 0])
        cells = f"{start[0, i]:,.0f}", f"{median:.0f} ({speed[:, i].min():.0f} to {speed[:, i].max():.0f})"
        iteration = "" if np.isnan(iterations[:, i]).any() else f"{np.median(iterations[:, i]):.1f}"
        print(f"| {run.name} | {' | '.join(cells)} | {ratio:.2f} | {iteration} |")


if __name__ == "__main__":
    main()
