"""Small continuous tasks for the tests: gymnasium imports this module for ids such as `point_env:Point-v0`."""

import gymnasium as gym
import numpy as np


class Point(gym.Env):
    """Move a point in the plane to the origin: reward -‖position‖², actions are displacements of at most 0.2.

    nan_at: the step of the environment's life at which it returns NaN. The reward is a constant where one is given.
    terminal: whether an episode really ends after its first step.
    """

    observation_space = gym.spaces.Box(-2.0, 2.0, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, render_mode=None, nan_at=None, reward=None, terminal=False):
        self.nan_at, self.reward, self.terminal, self.steps = nan_at, reward, terminal, 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.uniform(-1, 1, 2)
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        self.position = np.clip(self.position + 0.2 * action, -2, 2)
        reward = -float(self.position @ self.position) if self.reward is None else self.reward
        if self.steps == self.nan_at:
            reward = float("nan")
        return self.position.astype(np.float32), reward, self.terminal, False, {}


class Unbounded(Point):
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,))


class Compass(Point):
    """Point with four actions, numbered from 1, each a step along an axis."""

    action_space = gym.spaces.Discrete(4, start=1)

    def step(self, action):
        assert self.action_space.contains(action)
        return super().step(2 * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])[action - 1])


class TwoBoxes(Point):
    action_space = gym.spaces.MultiDiscrete([2, 2])


gym.register("Point-v0", Point, max_episode_steps=20)
gym.register("PointNaN-v0", Point, max_episode_steps=20, kwargs={"nan_at": 150})
gym.register("PointTimeout-v0", Point, max_episode_steps=1000, kwargs={"reward": 1.0})
gym.register("PointTerminal-v0", Point, max_episode_steps=1000, kwargs={"reward": 1.0, "terminal": True})
gym.register("PointUnbounded-v0", Unbounded, max_episode_steps=20)
gym.register("Compass-v0", Compass, max_episode_steps=20)
gym.register("TwoBoxes-v0", TwoBoxes, max_episode_steps=20)
