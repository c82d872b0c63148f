"""What stac_ac.py adds to the simulator: process time per environment step, the contestants in turns.

    python benchmark/collect.py CartPole-v1 Hopper-v4 Reacher-v4 HalfCheetah-v4

bare: the environment alone, on the same actions and with as many resets; collect: the batch of the script; none, actor:
collecting and the update. Fastest of `ROUNDS` turns of one batch each, on one thread.
"""

import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import stac_ac  # noqa: E402

ROUNDS, NUM_STEPS = 5, 4_000


def timed(function, *args):
    """Process time in seconds (other programs on the machine do not count), and the result."""
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def play(env, actions, starts):
    """The bare simulator."""
    for t, action in enumerate(actions):
        if starts[t]:
            env.reset(seed=t)
        env.step(action)


def measure(env_id, unroll):
    """µs per step of each contestant."""
    env, bare = stac_ac.make_env(env_id), gym.make(env_id)
    torch.manual_seed(1)
    actor = stac_ac.Actor(env.observation_space, env.action_space)
    critic = stac_ac.Critic(env.observation_space)
    optimizers = [torch.optim.SGD(net.parameters(), 1e-3) for net in (actor, critic)]
    seconds = {"bare": [], "collect": [], "none": [], "actor": []}
    for turn in range(ROUNDS):
        duration, (batch, _) = timed(stac_ac.collect, env, actor, NUM_STEPS, 1, turn * NUM_STEPS)
        seconds["collect"].append(duration)
        trajectory = batch.trajectory.numpy()
        starts = np.append(True, trajectory[1:] != trajectory[:-1])
        actions = batch.actions.numpy()
        if not actor.discrete:
            actions = actions.clip(bare.action_space.low, bare.action_space.high)
        seconds["bare"].append(timed(play, bare, actions, starts)[0])
        for leader in ("none", "actor"):
            args = stac_ac.Args(leader=leader, unroll=unroll, lam=0.0 if actor.discrete else 500.0)
            duration, _ = timed(stac_ac.stackelberg_update, actor, critic, *optimizers, batch, args.lam, args)
            seconds[leader].append(duration + seconds["collect"][-1])
    return {name: min(values) / NUM_STEPS * 1e6 for name, values in seconds.items()}


def main():
    torch.set_num_threads(1)
    print("| task | m | bare, µs/step | collect | none | actor | bare/collect | steps/s: none | actor |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for env_id in sys.argv[1:]:
        for unroll in (1, 80):
            cost = measure(env_id, unroll)
            cells = " | ".join(f"{value:.1f}" for value in cost.values())
            speeds = " | ".join(f"{1e6 / cost[leader]:,.0f}" for leader in ("none", "actor"))
            print(f"| {env_id} | {unroll} | {cells} | {cost['bare'] / cost['collect']:.2f} | {speeds} |")


if __name__ == "__main__":
    main()
