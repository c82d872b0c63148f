"""Small continuous tasks for the tests: gymnasium imports this module for ids such as `point_env:Point-v0`."""

import os
import signal

import gymnasium as gym
import numpy as np


class Point(gym.Env):
    """Move a point in the plane to the origin: reward -‖position‖², actions are displacements of at most 0.2.

    spoil: {step of the environment's life: the reward there}. The reward is a constant where one is given.
    terminal: whether an episode really ends after its first step. in_place: whether it changes its observation's array,
    as some environments do. With POINT_KILL_AT in the process's environment it kills the process at that step.
    """

    observation_space = gym.spaces.Box(-2.0, 2.0, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, reward=None, terminal=False, spoil=None, in_place=False):
        self.reward, self.terminal, self.spoil, self.in_place, self.steps = reward, terminal, spoil or {}, in_place, 0
        self.position = np.zeros(2, np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position[:] = self.np_random.uniform(-1, 1, 2)
        return self.observation(), {}

    def observation(self):
        return self.position if self.in_place else self.position.copy()

    def step(self, action):
        self.steps += 1
        if self.steps == int(os.environ.get("POINT_KILL_AT", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        self.position[:] = np.clip(self.position + 0.2 * action, -2, 2)
        reward = -float(self.position @ self.position) if self.reward is None else self.reward
        return self.observation(), self.spoil.get(self.steps, reward), self.terminal, False, {}


class Rendering(Point):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        return np.full((64, 64, 3), int(127 + 60 * self.position[0]), np.uint8)


class BadReset(Point):
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if self.steps:
            self.position[0] = np.nan
        return self.position, {}


class Unbounded(Point):
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,))


class Matrix(Point):
    action_space = gym.spaces.Box(-1.0, 1.0, (2, 2))


class Small(Point):
    """Integer actions of a narrow type, and observations that are a dictionary."""

    action_space = gym.spaces.Box(-100, 100, (2,), np.int8)
    observation_space = gym.spaces.Dict({"position": Point.observation_space})

    def reset(self, seed=None, options=None):
        return {"position": super().reset(seed)[0]}, {}

    def step(self, action):
        position, *rest = super().step(action / 100)
        return {"position": position}, *rest


class NoFixedSize(Point):
    observation_space = gym.spaces.Sequence(Point.observation_space)


class Compass(Point):
    """Point with four actions, numbered from 1, each a step along an axis."""

    action_space = gym.spaces.Discrete(4, start=1)

    def step(self, action):
        assert self.action_space.contains(action)
        return super().step(2 * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])[action - 1])


class TwoBoxes(Point):
    action_space = gym.spaces.MultiDiscrete([2, 2])


gym.register("Point-v0", Point, max_episode_steps=20)
gym.register("PointNaN-v0", Point, max_episode_steps=20, kwargs={"spoil": {150: float("nan")}})
gym.register("PointHuge-v0", Point, max_episode_steps=20, kwargs={"spoil": {150: 1e300}})
gym.register("PointBadReset-v0", BadReset, max_episode_steps=20)
gym.register("PointRendering-v0", Rendering, max_episode_steps=20)
gym.register("PointInPlace-v0", Point, max_episode_steps=20, kwargs={"in_place": True})
gym.register("PointMatrix-v0", Matrix, max_episode_steps=20)
gym.register("PointSmall-v0", Small, max_episode_steps=20)
gym.register("PointNoFixedSize-v0", NoFixedSize, max_episode_steps=20)
gym.register("PointTimeout-v0", Point, max_episode_steps=1000, kwargs={"reward": 1.0})
gym.register("PointTerminal-v0", Point, max_episode_steps=1000, kwargs={"reward": 1.0, "terminal": True})
gym.register("PointUnbounded-v0", Unbounded, max_episode_steps=20)
gym.register("Compass-v0", Compass, max_episode_steps=20)
gym.register("TwoBoxes-v0", TwoBoxes, max_episode_steps=20)
