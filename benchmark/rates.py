"""STAC against AC, each at its best step size: the study that stac_ac.sh makes with ARMS, RATES and UNROLLS.

    python benchmark/rates.py runs --out benchmark/results

reads finished runs of stac_ac.py and writes

- stac_ac_rates.csv: for five batches each of every run the mean return, and medians of |implicit| / |direct| and of the
  cosine. Runs of an earlier CSV that are not in the folders stay.
- stac_ac_rates.md, also printed: the score of each arm at each rate, and the comparison at the best one.
- stac_ac_rates.png: score against rate, learning curves at the best rate, and the size of the implicit term;
  stac_ac_curves.png: the last two of these for tasks with several arms, of which one had no choice.

An arm's best rate is that of the largest mean area under the curve over the seeds up to 10. The seeds from 11 on are
compared, which had no part in the choice. An arm that had no choice is compared with all its seeds.
"""

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from plot import cell, digits, final_score, improvement_interval, iqm_interval, mark, mean_interval, note, stop, table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

BATCHES = 5  # in a row of the CSV
FIRST_COMPARED = 11  # the first seed that is compared and not chosen by
COLUMNS = ["environment", "noise", "m", "arm", "rate", "seed", "step", "return", "ratio", "cosine"]
ARMS = {  # (leader, start_states, curvature, stac_ac_scaled.py): label, colour
    ("none", "every", "hessian", False): ("AC", "#1f5fa8"),
    ("actor", "every", "hessian", False): ("STAC, every", "#b8171c"),
    ("actor", "initial", "hessian", False): ("STAC, initial", "#e08a1e"),
    ("actor", "batch", "hessian", False): ("STAC, batch", "#3a9a44"),
    ("actor", "every", "gauss-newton", False): ("STAC, every, Gauss–Newton", "#8458b3"),
    ("actor", "batch", "gauss-newton", False): ("STAC, batch, Gauss–Newton", "#17a2a8"),
    ("actor", "every", "hessian", True): ("control: STAC, every, as long as AC", "#d45fa5"),
}
COLOURS = dict(ARMS.values())


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)
    """folders of run folders"""
    out: Path = Path("benchmark/results")
    """the folder to write to"""


# Runs. A run's key: (environment, noise, m, arm, rate, seed); its value: [T, 4], step, return, ratio, cosine
def read_run(folder):
    """Key and values of a finished run of an arm; None for another."""
    args = torch.load(folder / "model.pt", weights_only=True)["args"]
    scaled = args["exp_name"].endswith("-scaled")
    arm = ARMS.get((args["leader"], args.get("start_states"), args.get("curvature"), scaled))
    if "num_steps" not in args or not arm:
        return None
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # critical: 0 is all of them
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("charts/batch_return")]
    terms = np.full((len(points), 3), np.nan)
    for column, tag in enumerate(("implicit_norm", "direct_norm", "cosine")):
        if f"stackelberg/{tag}" in events.Tags()["scalars"]:
            found = {event.step: event.value for event in events.Scalars(f"stackelberg/{tag}")}
            terms[:, column] = [found[step] for step, _ in points]
    ratio = terms[:, 0] / np.maximum(terms[:, 1], np.finfo(np.float32).tiny)  # a policy that has died has no gradient
    values = np.column_stack([points, ratio, terms[:, 2]])
    values = values[: len(values) // BATCHES * BATCHES].reshape(-1, BATCHES, 4)
    rows = [values[:, -1, 0], values[:, :, 1].mean(1), *np.median(values[:, :, 2:], 1).T]
    key = args["env_id"], args["grad_noise"], args["unroll"], arm[0], args["policy_lr"], args["seed"]
    return key, np.column_stack(rows)


def read_csv(path):
    rows = defaultdict(list)
    with open(path, newline="") as file:
        for environment, noise, m, arm, rate, seed, *values in list(csv.reader(file))[1:]:
            key = environment, float(noise), int(m), arm, float(rate), int(seed)
            rows[key].append([float(x or "nan") for x in values])
    return {key: np.array(values) for key, values in rows.items()}


def write_csv(runs, path):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for key in sorted(runs):
            for step, *values in runs[key]:
                writer.writerow([*key, int(step), *("" if np.isnan(x) else f"{x:.4g}" for x in values)])


def panels_of(runs):
    """{title: {arm: {rate: {seed: [T, 4]}}}}, arms in the order of ARMS."""
    panels, lengths = defaultdict(lambda: defaultdict(lambda: defaultdict(dict))), {}
    for key in sorted(runs, key=lambda key: (key[:3], list(COLOURS).index(key[3]), key[4:])):
        environment, noise, m, arm, rate, seed = key
        title = f"{environment}, m = {m}" + f", noise {noise}" * (noise > 0)
        if len(runs[key]) != lengths.setdefault(title, len(runs[key])):
            stop(f"{title}: the run {key} has another length than the others")
        panels[title][arm][rate][seed] = runs[key]
    return panels


def chosen(seeds):
    """A rate's runs that the best one is chosen by."""
    return [run for seed, run in seeds.items() if seed < FIRST_COMPARED]


def area(runs):
    """Area under the curve of each run, divided by its length in steps: the mean return of its batches."""
    return np.array([run[:, 1].mean() for run in runs])


def best(rates):
    """An arm's best rate, the runs to be compared there, and a mark of what is wrong with them."""
    if len(rates) == 1:
        ((rate, seeds),) = rates.items()
        return rate, [*seeds.values()], ""
    scores = {rate: area(chosen(seeds)).mean() for rate, seeds in rates.items() if chosen(seeds)}
    rate = max(scores, key=scores.get)
    compared = [run for seed, run in rates[rate].items() if seed >= FIRST_COMPARED]
    end = " ‡" * (rate in (min(scores), max(scores)))
    return rate, compared or chosen(rates[rate]), end if compared else end + " §"


# Tables
def returns_of(runs):
    """[runs, T]"""
    return np.array([run[:, 1] for run in runs])


def rate_rows(panels):
    everything = sorted({rate for p in panels.values() for rates in p.values() for rate in rates if len(rates) > 1})
    yield ["task", "run", "seeds", *everything]
    for title, panel in panels.items():
        areas = [area(seeds.values()) for rates in panel.values() for seeds in rates.values()]
        places = max(0, digits(np.concatenate(areas)) - 1)
        for arm, rates in panel.items():
            numbers = [len(chosen(seeds)) for seeds in rates.values() if chosen(seeds)]
            if len(numbers) > 1:
                cells, (top, *_) = [], best(rates)
                for rate in everything:
                    scores = area(chosen(rates.get(rate, {})))
                    few = f" ({mark([len(scores)])})" * (len(scores) < max(numbers))
                    text = ""
                    if len(scores):
                        text = cell((scores.mean(), (scores.min(), scores.max())), len(scores), places) + few
                    cells.append(f"**{text}**" if rate == top else text)
                yield [title, arm, max(numbers), *cells]


def comparison_rows(panels):
    rng = np.random.default_rng(0)
    head = "task, run, rate, seeds, final score, area under the curve, better than AC at the end, in the area"
    yield [*head.split(", "), "implicit / direct", "cosine"]
    for title, panel in panels.items():
        compared = {arm: best(rates) for arm, rates in panel.items()}
        scores = {
            arm: (final_score(runs[0][:, 0], returns_of(runs)), area(runs)) for arm, (_, runs, _) in compared.items()
        }
        places = digits(np.concatenate([x for both in scores.values() for x in both]))
        for arm, (rate, runs, wrong) in compared.items():
            cells = [cell(iqm_interval([x], rng), len(runs), places) for x in scores[arm]]
            for mine, plain in zip(scores[arm], scores["AC"]) if arm != "AC" and "AC" in scores else []:
                cells.append(cell(improvement_interval([(mine, plain)], rng), len(runs), 2))
            terms = np.array([np.median(run[:, 2:], 0) for run in runs])
            sizes = [f"{low:.3g} to {high:.3g}" for low, high in zip(terms.min(0), terms.max(0)) if not np.isnan(low)]
            cells += [""] * (4 - len(cells)) + sizes + [""] * (2 - len(sizes))
            yield [title, arm, f"{rate:g}{wrong}", mark([len(runs)]), *cells]


def doubled_rows(panels):
    rng = np.random.default_rng(0)
    yield "task", "run", "pairs of rates", "seeds each", "better in the area"
    arms = "STAC, batch", "STAC, batch, Gauss–Newton"
    for title, panel, arm in [(*item, arm) for item in panels.items() for arm in arms]:
        batch, ac = panel.get(arm, {}), panel.get("AC", {})
        common = [rate for rate in batch if chosen(batch[rate]) and chosen(ac.get(2 * rate, {}))]
        pairs = [(chosen(batch[rate]), chosen(ac[2 * rate])) for rate in common]
        if pairs:
            names = ", ".join(f"{rate:g}/{2 * rate:g}" for rate in common)
            estimate = improvement_interval([(area(x), area(y)) for x, y in pairs], rng)
            seeds = min(len(runs) for pair in pairs for runs in pair)
            yield title, arm, names, mark([seeds]), cell(estimate, seeds, 2)


def report(panels):
    rates, comparison, doubled = (list(rows(panels)) for rows in (rate_rows, comparison_rows, doubled_rows))
    return f"""Area under the curve (mean return of the batches) at each learning rate of the actor; mean, lowest and highest of the
seeds up to {FIRST_COMPARED - 1}. **Bold**: the best.

{table(rates[0], rates[1:])}
At each arm's best rate, with other seeds where there was a choice: interquartile mean and 95 % bootstrap interval. Final
score: mean of the batches in the last tenth. Better than AC: how often a seed beats one of AC at AC's best rate, 0.5 is
no difference. Last two columns: medians over a run's batches, from the lowest to the highest seed. † few seeds; ‡ the
best rate is an end of those that were tried; § the seeds that chose are the ones compared, so the score is too high.

{table(comparison[0], comparison[1:])}
STAC `batch` against AC at twice its rate, seeds up to {FIRST_COMPARED - 1}: how often a seed of it beats one of AC, mean over the rates.

{table(doubled[0], doubled[1:])}"""  # noqa: E501


# Figures
def has_choice(panel):
    return min(map(len, panel.values())) > 1  # each arm


def draw(panels, path):
    """A column for each task, noise and m; score against rate, curves at the best rate, size of the implicit term."""
    rng, columns, rows = np.random.default_rng(0), len(panels), 3 if any(map(has_choice, panels.values())) else 2
    figure, axes = plt.subplots(
        rows, columns, figsize=(1 + 3.2 * columns, 2.8 * rows), layout="constrained", squeeze=False
    )
    for (*top, middle, bottom), (title, panel) in zip(axes.T, panels.items()):
        (*top, middle)[0].set_title(title, fontsize=10)
        for arm, rates in panel.items():
            scores = {rate: area(chosen(seeds)) for rate, seeds in sorted(rates.items()) if chosen(seeds)}
            for ax in top:
                value = np.array([x.mean() for x in scores.values()])
                low, high = np.array([mean_interval(x[:, None], rng)[:, 0] for x in scores.values()]).T
                ax.errorbar([*scores], value, [value - low, high - value], color=COLOURS[arm], marker="o", ms=3)
            rate, runs, _ = best(rates)
            steps, returns = runs[0][:, 0], returns_of(runs)
            label = arm + f", {rate:g}" * (len(rates) > 1)
            middle.plot(steps, returns.mean(0), color=COLOURS[arm], label=label)
            middle.fill_between(steps, *mean_interval(returns, rng), color=COLOURS[arm], alpha=0.18, lw=0)
            if not np.isnan(runs[0][0, 2]):
                bottom.plot(steps, np.median([run[:, 2] for run in runs], 0), color=COLOURS[arm])
        for ax in top:
            ax.set(xscale="log", xlabel="actor's learning rate", ylabel="area under the curve")
        middle.set(xlabel="environment steps", ylabel="return of the batch")
        low, high = middle.get_ylim()
        middle.set_ylim(low, high + 0.14 * len(panel) * (high - low))  # room for the legend
        middle.legend(fontsize=7, frameon=False, loc="upper left")
        bottom.set(xlabel="environment steps", ylabel="|implicit| / |direct|")
        bottom.set_yscale("log", nonpositive="mask")  # a solve that ends at once has no implicit term
        bottom.set_ylim(bottom=max(bottom.get_ylim()[0], 1e-3))
        for ax in (*top, middle, bottom):
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(alpha=0.25)
        for ax in (middle, bottom):
            ax.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main():
    args = tyro.cli(Args, description=__doc__)
    path = args.out / "stac_ac_rates.csv"
    runs, new = read_csv(path) if path.exists() else {}, {}
    for folder in sorted(file.parent for runs_in in args.folders for file in runs_in.glob("*__*/checkpoint.pt")):
        if not (folder / "model.pt").exists():
            note(f"left out, not finished: {folder}")
        elif found := read_run(folder):
            if found[0] in new:
                stop(f"more than one run of {found[0]}; the second is {folder}")
            new[found[0]] = found[1]
    if not (runs | new):
        stop(f"no finished run of stac_ac.py in {', '.join(map(str, args.folders))}")
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(runs | new, path)
    panels = panels_of(read_csv(path))  # as the CSV has it: the same tables come of the CSV alone
    text = report(panels)
    (args.out / "stac_ac_rates.md").write_text(text)
    with_choice = {title: panel for title, panel in panels.items() if has_choice(panel)}
    others = {title: panel for title, panel in panels.items() if not has_choice(panel) and len(panel) > 1}
    for name, some in (("stac_ac_rates.png", with_choice), ("stac_ac_curves.png", others)):
        if some:
            draw(some, args.out / name)
    print(text)


if __name__ == "__main__":
    main()
