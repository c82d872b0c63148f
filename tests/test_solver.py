"""conjugate_gradient: right where it can be, harmless where it cannot."""

import inspect
import math

import pytest
import torch

import stsac


def spd(n, condition, seed=0, dtype=torch.float64):
    """A random symmetric positive definite matrix with eigenvalues from 1 to `condition`."""
    torch.manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    return ((q * torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ q.T).to(dtype)


def solve(A, b, max_iters=100, tol=1e-12, **kwargs):
    return stsac.conjugate_gradient(lambda v: A @ v, b, max_iters, tol, **kwargs)


def test_equals_dense_solve():
    A = spd(30, 1e4)
    b = torch.randn(30, dtype=torch.float64)
    x, info = solve(A, b, max_iters=300)
    # ‖x - A⁻¹b‖ ≤ κ · residual · ‖A⁻¹b‖ = 1e4 · 1e-12
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-8)
    assert info["residual"] <= 1e-12 and not info["negative_curvature"]
    assert torch.linalg.norm(b - A @ x) / b.norm() < 1e-11


def test_tolerance_is_relative_and_stops_early():
    A = spd(50, 1e3)
    b = torch.randn(50, dtype=torch.float64)
    _, coarse = solve(A, b, tol=1e-1)
    assert coarse["residual"] <= 1e-1 and coarse["iterations"] < 50
    for scale_A, scale_b in [(1e-9, 1e6), (1.0, 1e6), (1.0, 1e-6), (1e3, 1e-9)]:
        x, info = solve(scale_A * A, scale_b * b, tol=1e-1)
        assert info["iterations"] == coarse["iterations"]
        assert torch.linalg.norm(scale_b * b - scale_A * A @ x) / (scale_b * b).norm() <= 1.001e-1
    _, exact = solve(A, b, max_iters=1000, tol=0.0)  # goes to rounding and stops there, with nothing broken
    assert exact["residual"] < 1e-14 and exact["iterations"] < 200


def test_eigenvectors_cost_one_iteration_and_the_budget_is_kept():
    b = torch.ones(10, dtype=torch.float64)
    x, info = solve(3 * torch.eye(10, dtype=torch.float64), b)
    assert info["iterations"] == 1
    torch.testing.assert_close(x, b / 3)
    calls = []
    A = spd(50, 1e6)
    _, info = stsac.conjugate_gradient(lambda v: calls.append(1) or A @ v, torch.ones(50, dtype=torch.float64), 7, 0.0)
    assert len(calls) == info["iterations"] == 7


def test_preconditioner():
    A = spd(40, 1e6)
    b = torch.randn(40, dtype=torch.float64)
    inverse = torch.linalg.inv(A + 0.1 * torch.eye(40, dtype=torch.float64))
    x, info = solve(A, b, tol=1e-10, preconditioner=lambda r: inverse @ r)
    _, plain = solve(A, b, tol=1e-10)
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-4, atol=1e-4 * 1e-6)
    assert info["iterations"] <= 12 < plain["iterations"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestBrokenSystems:
    def test_negative_definite_gives_zero(self, dtype):
        x, info = solve(-spd(10, 10, dtype=dtype), torch.ones(10, dtype=dtype))
        assert (x == 0).all() and info["negative_curvature"] and info["iterations"] == 0 and info["residual"] == 1

    def test_indefinite_keeps_the_iterate(self, dtype):
        A = torch.diag(torch.tensor([5.0, 4.0, 3.0, -0.1], dtype=dtype))
        b = torch.tensor([1.0, 2.0, 3.0, 0.1], dtype=dtype)
        x, info = solve(A, b)
        assert x.isfinite().all() and x.abs().sum() > 0
        assert info["negative_curvature"] and 1 <= info["iterations"] < 4
        assert info["residual"].isfinite()

    def test_singular(self, dtype):
        A = spd(10, 10, dtype=dtype)
        A = A - A @ torch.ones(10, 10, dtype=dtype) / 10  # remove one direction
        A = (A + A.T) / 2
        A = A @ A
        for b in (torch.ones(10, dtype=dtype), torch.randn(10, dtype=dtype)):
            x, info = solve(A, b)
            assert x.isfinite().all() and info["residual"].isfinite()
        x, info = solve(torch.zeros(10, 10, dtype=dtype), torch.ones(10, dtype=dtype))
        assert (x == 0).all() and info["negative_curvature"]

    def test_singular_and_inconsistent(self, dtype):
        """b has a part in the null space, so there is no solution, and pᵀAp sinks into rounding noise."""
        for seed in range(20):
            q = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(seed)).double())[0]
            A = ((q[:, :19] * torch.linspace(1, 10, 19, dtype=torch.float64)) @ q[:, :19].T).to(dtype)
            x, info = solve(A, q.sum(1).to(dtype))
            assert x.isfinite().all() and info["negative_curvature"]
            assert info["residual"] > 0.1  # says that nothing was solved: the null part is 1/√20 of b

    def test_zero_right_hand_side(self, dtype):
        x, info = solve(spd(10, 10, dtype=dtype), torch.zeros(10, dtype=dtype))
        assert (x == 0).all() and info["residual"] == 0 and info["iterations"] == 0
        assert not info["negative_curvature"]

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_not_finite(self, dtype, bad):
        b = torch.ones(10, dtype=dtype)
        b[3] = bad
        x, info = solve(spd(10, 10, dtype=dtype), b)
        assert (x == 0).all() and info["residual"] == math.inf and info["iterations"] == 0
        A = spd(10, 10, dtype=dtype)
        A[0, 0] = bad
        x, info = solve(A, torch.ones(10, dtype=dtype))
        assert (x == 0).all() and info["residual"] == math.inf
        assert not any(value.isnan() for value in info.values())

    def test_not_finite_later_keeps_the_iterate(self, dtype):
        A, calls = spd(10, 100, dtype=dtype), []

        def matvec(v):
            calls.append(v)
            return A @ v if len(calls) < 3 else math.nan * v

        x, info = stsac.conjugate_gradient(matvec, torch.ones(10, dtype=dtype), 10, 0.0)
        assert x.isfinite().all() and x.abs().sum() > 0
        assert info["iterations"] == 2 and info["residual"] == math.inf

    def test_overflow(self, dtype):
        tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max / 100
        x, info = solve(tiny * torch.eye(10, dtype=dtype), huge * torch.ones(10, dtype=dtype))
        assert x.isfinite().all() and not info["residual"].isnan()

    def test_masks_do_what_the_early_stop_does(self, dtype):
        """What runs on a GPU: a fixed number of iterations, masked."""
        source = inspect.getsource(stsac.conjugate_gradient)
        assert 'b.device.type == "cpu"' in source
        masked = dict(vars(stsac))
        exec(source.replace('b.device.type == "cpu"', "False"), masked)
        bad = torch.ones(12, dtype=dtype)
        bad[0] = math.nan
        one = torch.ones(12, dtype=dtype)
        indefinite = torch.diag(torch.linspace(-1, 5, 12, dtype=dtype))
        good = spd(12, 10, dtype=dtype)
        cases = [(good, one), (indefinite, one), (good, bad), (good, 0 * one)]
        for A, b in cases:
            x, info = solve(A, b, tol=1e-5)
            x_masked, info_masked = masked["conjugate_gradient"](lambda v, A=A: A @ v, b, 100, 1e-5)
            assert torch.equal(x, x_masked) and info == info_masked
