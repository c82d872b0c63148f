"""Runs of the scripts, from inside and from the command line, and what they leave behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import stsac

ROOT = Path(__file__).parent.parent
# a run of a second: small networks, updates from step 50
SMALL = {
    **{"env_id": "point_env:Point-v0", "hidden": (16, 16), "batch_size": 16, "buffer_size": 1000, "alpha": 0.02},
    **{"start_steps": 50, "update_after": 50, "eval_every": 100, "eval_episodes": 2, "checkpoint_every": 40},
    **{"save_model": True, "cuda": False, "gamma": 0.9, "cg_iters": 3, "total_timesteps": 120},
}


def args(script=stsac, **changes):
    known = {name: value for name, value in SMALL.items() if name in script.Args.__dataclass_fields__}
    return script.Args(**{**known, **changes})


def flags(arguments):
    """The command line of an Args."""
    line = []
    for name, value in vars(arguments).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            line += [f"--{flag}", *map(str, value)]
        elif value is not None and value != "":
            line += [f"--{flag}", str(value)]
    return line


def command(*line, cwd, script=stsac.__file__, kill_at=0, **variables):
    """Starts a script as a user would, with the test environments in reach; they kill it at a step, if asked to."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    env |= {"POINT_KILL_AT": str(kill_at), **variables}
    line = [sys.executable, str(script), *map(str, line)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run_main(script, monkeypatch, *line):
    """The command line without a process of its own."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, line)])
    script.main()


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def weights(run_dir):
    state = torch.load(run_dir / "model.pt", weights_only=True)
    return {f"{net}.{name}": value for net in ("actor", "critic") for name, value in state[net].items()}


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def scalars(run_dir):
    """{tag: {step: value}}, but for the speed; a step that is there twice is an error."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        found[tag] = {e.step: e.value for e in events.Scalars(tag)}
        assert len(found[tag]) == len(events.Scalars(tag))
    found.pop("charts/SPS", None)
    return found


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def next_second():
    """Event files are in the order of their names, which have the second in them, and a counter that sorts as text."""
    time.sleep(1.01 - time.time() % 1)
