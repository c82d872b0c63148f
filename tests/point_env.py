"""Small tasks for the tests: gymnasium imports this module for ids such as `point_env:Point-v0`."""

import os
import random
import signal

import gymnasium as gym
import numpy as np


class Point(gym.Env):
    """Move a point in the plane to the origin: reward -‖position‖², actions are displacements of at most 0.2.

    spoil: {step of the environment's life: the reward there}. The reward is a constant where one is given.
    terminal: whether an episode really ends after its first step. in_place: whether it changes its observation's array,
    as some environments do. POINT_KILL_AT and POINT_INTERRUPT_AT in the process's environment name a step of
    the environment's life at which the process is killed or sees Ctrl-C.
    """

    observation_space = gym.spaces.Box(-2.0, 2.0, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, reward=None, terminal=False, spoil=None, in_place=False):
        self.reward = reward
        self.terminal = terminal
        self.spoil = spoil or {}
        self.in_place = in_place
        self.steps = 0
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
        if self.steps == int(os.environ.get("POINT_INTERRUPT_AT", 0)):
            raise KeyboardInterrupt
        self.position[:] = np.clip(self.position + 0.2 * action, -2, 2)
        reward = -float(self.position @ self.position) if self.reward is None else self.reward
        return self.observation(), self.spoil.get(self.steps, reward), self.terminal, False, {}


# The same task for a learner that treats its environment as it should
class ChangesAction(Point):
    def step(self, action):
        result = super().step(action)
        action *= 5
        return result


class Narrow(Point):
    """In other units (a power of two, so that nothing is rounded)."""

    action_space = gym.spaces.Box(-1 / 16, 1 / 16, (2,))

    def step(self, action):
        return super().step(16 * action)


class OwnEpisodeInfo(Point):
    def step(self, action):
        *result, _ = super().step(action)
        return *result, {"episode": {"r": 1.0, "l": 1, "t": 0.0}}


class ArrayReward(Point):
    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, np.array([reward]), *rest


class Int32Seed(Point):
    def reset(self, seed=None, options=None):
        return super().reset(int(np.int32(seed)))


# Odd ones
class GlobalGenerators(Point):
    """Draws from numpy's and python's generators, not from its own."""

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position[:] = np.random.uniform(-1, 1), random.uniform(-1, 1)
        return self.observation(), {}


class StrictBox(Point):
    """Bounds that float32 rounds to, and no patience for an action that leaves them by one rounding."""

    action_space = gym.spaces.Box(np.float32([-1.4, -0.3]), np.float32([0.8, 0.9]))

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step(action)


class Rendering(Point):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None, broken=False):
        super().__init__()
        self.render_mode = render_mode
        self.broken = broken

    def render(self):
        if self.broken:
            raise RuntimeError("no OpenGL")
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
        assert action.dtype == np.int8
        position, *rest = super().step(action / 100)
        return {"position": position}, *rest


class Fixed(Point):
    """One of the two actions can only be 0."""

    action_space = gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 0]))


class HugeObservation(Point):
    """Finite in float64 alone."""

    observation_space = gym.spaces.Box(-1e301, 1e301, (2,), np.float64)

    def observation(self):
        return self.position.astype(np.float64) * (1e300 if self.steps == 150 else 1.0)


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


for cls in (Point, ChangesAction, Narrow, OwnEpisodeInfo, ArrayReward, Int32Seed, GlobalGenerators, StrictBox):
    gym.register(f"{cls.__name__}-v0", cls, max_episode_steps=20)
for cls in (Rendering, BadReset, Unbounded, Matrix, Small, Fixed, HugeObservation, NoFixedSize):
    gym.register(f"Point{cls.__name__}-v0", cls, max_episode_steps=20)
for cls in (Compass, TwoBoxes):
    gym.register(f"{cls.__name__}-v0", cls, max_episode_steps=20)
gym.register("PointNaN-v0", Point, max_episode_steps=20, kwargs={"spoil": {150: float("nan")}})
gym.register("PointHuge-v0", Point, max_episode_steps=20, kwargs={"spoil": {150: 1e300}})
gym.register("PointInPlace-v0", Point, max_episode_steps=20, kwargs={"in_place": True})
gym.register("PointTimeout-v0", Point, max_episode_steps=1000, kwargs={"reward": 1.0})
gym.register("PointTerminal-v0", Point, max_episode_steps=1000, kwargs={"reward": 1.0, "terminal": True})
gym.register("PointNoTimeLimit-v0", Point)
gym.register("PointNotRendering-v0", Rendering, max_episode_steps=20, kwargs={"broken": True})
