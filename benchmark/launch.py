"""Makes the runs on standard input, one command a line without its interpreter, each to its end and none twice.

Called by the launchers, see matrix.sh. A run is what has the same --env-id, --exp-name and --seed; its folder is
runs/{env_id}__{exp_name}__{seed}__{unix time} in the working directory.

- finished: it has a model.pt, of at least as many steps as the command asks for. It is skipped.
- begun: it has a checkpoint.pt. The command carries it on, and the script refuses to do so with other flags. A finished
  run is made longer in the same way.
- else it is begun anew. A folder without a checkpoint stays as it is, and counts for nothing here or in plot.py.

runs/logs has the output of each run. That file is the run's lock, too, held until the run's own process has ended: by
whatever means a launcher died, the next one waits for what it left running, and several can share a matrix.
"""

import argparse
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

SCRIPTS = Path(__file__).resolve().parent.parent
RUNS = Path("runs")
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Run(NamedTuple):
    name: str
    """its folder's name but for the time"""
    command: tuple[str, ...]
    steps: int


def stop(message):
    """Ends the program with one line on stderr."""
    print(f"launch.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(line):
    """The run of one line of the matrix."""
    script, *words = shlex.split(line)
    flags = dict(zip(words, words[1:]))  # the last of two equal flags counts, as in the scripts
    # the scripts' own rule for a folder's name
    name = re.sub(r"[^\w.-]", "-", "__".join(flags[flag] for flag in ("--env-id", "--exp-name", "--seed")))
    path, here = SCRIPTS / script, Path.cwd()
    path = path.relative_to(here) if path.is_relative_to(here) else path
    if not flags["--total-timesteps"].isdecimal():
        stop(f"STEPS must be a number, not {flags['--total-timesteps']!r}")
    return Run(name, (os.environ.get("PYTHON", "python"), str(path), *words), int(flags["--total-timesteps"]))


def folders(run):
    """The folders of a run, the one with the newest checkpoint first; those without one last, the newest first."""
    mine = [path for path in RUNS.glob("*__*") if re.fullmatch(re.escape(run.name) + r"__\d+", path.name)]
    checkpoints = {path: path / "checkpoint.pt" for path in mine}
    age = {path: file.stat().st_mtime if file.exists() else 0 for path, file in checkpoints.items()}
    return sorted(mine, key=lambda path: (age[path], path.name), reverse=True)


def finished(folder, steps):
    """Whether a run's folder has the model of a training of at least that many steps."""
    if not (folder / "model.pt").exists():
        return False
    import torch  # takes a second or two

    return torch.load(folder / "model.pt", weights_only=True)["args"]["total_timesteps"] >= steps


def remaining(run):
    """The command that begins a run or carries it on; None if it is finished."""
    mine = folders(run)
    if any(finished(folder, run.steps) for folder in mine):
        return None
    if mine and (mine[0] / "checkpoint.pt").exists():
        return (*run.command, "--resume", str(mine[0]))
    return run.command


def steps_done(run):
    """Environment steps of an unfinished run, as of its log.txt."""
    logs = [folder / "log.txt" for folder in folders(run)[:1]]
    steps = [step for log in logs if log.exists() for step in re.findall(r"(?m)^step (\d+):", log.read_text())]
    return min(int(steps[-1]), run.steps) if steps else 0


def log_file(run):
    return RUNS / "logs" / f"{run.name}.log"


def lock(run):
    """The run's log file, open and locked; None if another process is at this run."""
    log_file(run).parent.mkdir(parents=True, exist_ok=True)
    log = open(log_file(run), "ab")
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        return None
    except OSError as e:  # some network file systems have no locks
        stop(f"cannot lock {log_file(run)}: {e.strerror}")
    return log


def start(command, log):
    """A run's process. It has the log open as well, so the lock is held as long as either of us lives."""
    log.write(f"$ {shlex.join(command)}\n".encode())
    log.flush()
    env = {**os.environ, **THREADS}
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env)


def explain(run, code):
    """One line on a run that failed: the signal that ended it, or its last words."""
    *_, last = log_file(run).read_text(errors="replace").strip().splitlines()
    why = f"killed by signal {-code}" if code < 0 else last
    return f"failed: {run.name} ({why}; see {log_file(run)})"


class Progress:
    """The progress line: on a terminal always the last line, elsewhere after each message and every ten minutes."""

    def __init__(self, runs):
        self.runs, self.ended, self.last = runs, {run.name for run in runs if remaining(run) is None}, 0.0
        self.start, self.done_at_start = time.monotonic(), self.done()

    def done(self):
        return sum(run.steps if run.name in self.ended else steps_done(run) for run in self.runs)

    def show(self, running, message=""):
        """Prints the message, if any, and brings the line up to date if it is time to."""
        now, live = time.monotonic(), sys.stdout.isatty()
        if not message and now - self.last < (10 if live else 600):
            return
        self.last, done, total = now, self.done(), sum(run.steps for run in self.runs)
        share = f"{len(self.ended)}/{len(self.runs)} runs finished, {running} running here"
        line = f"{share}, {100 * done // total} % of the steps"
        if self.done_at_start < done < total:  # if the other steps are as fast as those since the start
            left = (total - done) * (now - self.start) / (done - self.done_at_start)
            line += f", about {timedelta(seconds=round(left))} left"
        clear, end = ("\r\033[K", "") if live else ("", "\n")
        print(clear + (f"{message}\n" if message else "") + line, end=end, flush=True)


def make(runs, workers):
    """Makes all runs, `workers` at a time. Returns those that failed."""
    waiting, running, failed, progress = list(runs), {}, [], Progress(runs)
    progress.show(0, f"runs: {RUNS.resolve()}, logs: {RUNS.resolve() / 'logs'}")
    try:
        while waiting or running:
            messages = []
            for run, (process, log) in list(running.items()):
                if process.poll() is None:
                    continue
                log.close()
                del running[run]
                if process.returncode:
                    failed.append(run)
                    messages.append(explain(run, process.returncode))
                else:
                    progress.ended.add(run.name)
                    messages.append(f"finished: {run.name}")
            for run in list(waiting):
                if len(running) == workers:
                    break
                if log := lock(run):  # else another launcher is at it; later we see whether it came to the end
                    waiting.remove(run)
                    if command := remaining(run):
                        running[run] = start(command, log), log
                    else:
                        messages += [f"finished elsewhere: {run.name}"] * (run.name not in progress.ended)
                        progress.ended.add(run.name)
                        log.close()
            progress.show(len(running), "\n".join(messages))
            time.sleep(0.2)
    finally:
        if sys.stdout.isatty():
            print()
        for process, _ in running.values():  # none but after an interrupt
            process.terminate()
        for process, _ in running.values():
            process.wait()
    return failed


def main():
    parser = argparse.ArgumentParser(prog="launch.py", description="See benchmark/matrix.sh for the variables.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--dry-run", action="store_true", help="print the commands of the runs that are not finished")
    choice.add_argument("--count", action="store_true", help="print how many runs the matrix has, finished or not")
    choice.add_argument("--task", type=int, metavar="N", help="make one run only: N of the matrix, counted from 0")
    args = parser.parse_args()
    runs = [parse(line) for line in sys.stdin.read().splitlines() if line]
    workers = os.environ.get("WORKERS", "1")
    if not runs:
        stop("the matrix is empty")
    if len({run.name for run in runs}) < len(runs):
        stop("two runs of the matrix have the same environment, experiment name and seed")
    if not workers.isdecimal() or int(workers) < 1:
        stop(f"WORKERS must be at least 1, not {workers!r}")
    if args.task is not None and not 0 <= args.task < len(runs):
        stop(f"--task must be at least 0 and less than {len(runs)}")
    if args.count:
        print(len(runs))
    elif args.dry_run:
        for run in runs:
            if command := remaining(run):
                print(shlex.join(command))
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            failed = make(runs if args.task is None else [runs[args.task]], int(workers))
        except KeyboardInterrupt:
            print("launch.py: interrupted; the same command carries on", file=sys.stderr)
            raise SystemExit(130) from None
        if failed:
            print("launch.py: error: failed:", *(run.name for run in failed), file=sys.stderr)
            raise SystemExit(1)


if __name__ == "__main__":
    main()
