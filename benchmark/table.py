"""Returns of finished or running runs as a table, mean (lowest to highest) over seeds, and as CSV.

    python benchmark/table.py runs --at 100000 200000 400000 800000 --csv benchmark/results/cartpole.csv

Reads the log.txt of every run below the folder: evaluation returns of stsac.py and stddpg.py, batch returns of
stac_ac.py. Runs are one line where environment and experiment name are the same.
"""

import csv
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]
    """folder of run folders"""
    at: tuple[int, ...]
    """environment steps to show"""
    csv: Path | None = None
    """file for all returns: environment, experiment, seed, step, return"""


def read(folder):
    """{(environment, experiment): {seed: {step: return}}} of all runs in `folder`."""
    runs = defaultdict(dict)
    for log in sorted(folder.glob("*/log.txt")):
        environment, experiment, seed, _ = log.parent.name.rsplit("__", 3)
        returns = re.findall(r"^step (\d+): (?:eval|batch) return (-?[\d.]+)", log.read_text(), re.MULTILINE)
        runs[environment, experiment][int(seed)] = {int(step): float(value) for step, value in returns}
    return runs


def main():
    args = tyro.cli(Args, description=__doc__)
    runs = read(args.folder)
    print("| task | run | seeds | " + " | ".join(f"{step:,}" for step in args.at) + " |")
    print("| --- " * (3 + len(args.at)) + "|")
    for (environment, experiment), seeds in runs.items():
        cells = []
        for step in args.at:
            values = [returns[step] for returns in seeds.values() if step in returns]
            spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4g}{spread}" if len(values) == len(seeds) else "")
        print(f"| {environment} | {experiment} | {len(seeds)} | {' | '.join(cells)} |")
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(args.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["environment", "experiment", "seed", "step", "return"])
            for names, seeds in runs.items():
                writer.writerows([*names, seed, *point] for seed, run in seeds.items() for point in run.items())


if __name__ == "__main__":
    main()
