"""conjugate_gradient: right where it can be, harmless where it cannot, with a preconditioner and without."""

import math

import pytest
import torch

import stsac

DTYPES = [torch.float32, torch.float64]


def spd(n, condition, seed=0, dtype=torch.float64):
    """A random symmetric positive definite matrix with eigenvalues from 1 to `condition`."""
    torch.manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    return ((q * torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ q.T).to(dtype)


def solve(A, b, max_iters=100, tol=1e-12, M=None, breaks_after=math.inf):
    """x, info and how many products it took; A is NaN after a number of products."""
    products = []

    def matvec(v):
        products.append(v)
        return A @ v * (1 if len(products) <= breaks_after else math.nan)

    preconditioner = None if M is None else lambda r: M @ r
    x, info = stsac.conjugate_gradient(matvec, b, max_iters, tol, preconditioner)
    return x, info, len(products)


def residual(A, b, x):
    return float((b - A @ x).norm() / b.norm())


def test_is_the_dense_solve():
    A = spd(30, 1e4)
    b = torch.randn(30, dtype=torch.float64)
    x, info, _ = solve(A, b, max_iters=300)
    # ‖x - A⁻¹b‖ ≤ κ · residual · ‖A⁻¹b‖ = 1e4 · 1e-12
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-8)
    assert info["residual"] <= 1e-12
    assert not info["negative_curvature"]
    assert residual(A, b, x) < 1e-11


def test_tolerance_is_relative_and_stops_early():
    A = spd(50, 1e3)
    b = torch.randn(50, dtype=torch.float64)
    _, coarse, products = solve(A, b, tol=1e-1)
    assert coarse["residual"] <= 1e-1
    assert products == coarse["iterations"] < 50
    for scale_A, scale_b in [(1e-9, 1e6), (1.0, 1e6), (1.0, 1e-6), (1e3, 1e-9)]:
        x, info, _ = solve(scale_A * A, scale_b * b, tol=1e-1)
        assert info["iterations"] == coarse["iterations"]
        assert residual(scale_A * A, scale_b * b, x) <= 1.001e-1
    _, exact, _ = solve(A, b, max_iters=1000, tol=0.0)  # goes to rounding and stops there, with nothing broken
    assert exact["residual"] < 1e-14
    assert exact["iterations"] < 200


def test_eigenvectors_cost_one_iteration_and_the_budget_is_kept():
    b = torch.ones(50, dtype=torch.float64)
    x, info, _ = solve(3 * torch.eye(50, dtype=torch.float64), b)
    assert info["iterations"] == 1
    torch.testing.assert_close(x, b / 3)
    _, info, products = solve(spd(50, 1e6), b, max_iters=7, tol=0.0)
    assert products == info["iterations"] == 7


@pytest.mark.parametrize("dtype", DTYPES)
class TestPreconditioner:
    def test_starts_from_its_solution(self, dtype):
        """With no iterations, or at a tolerance that Mb meets, the result is Mb, and the residual its true one."""
        A = spd(30, 10, dtype=dtype)
        M = torch.linalg.inv(A + 0.1 * torch.eye(30, dtype=dtype))
        b = torch.randn(30, dtype=dtype)
        for max_iters, tol in ((0, 0.0), (100, 1.01 * residual(A, b, M @ b))):
            x, info, products = solve(A, b, max_iters, tol, M)
            assert torch.equal(x, M @ b)
            assert products == 1
            assert info["iterations"] == 0
            assert info["residual"] == pytest.approx(residual(A, b, M @ b), rel=1e-4)

    def test_a_good_one_saves_iterations(self, dtype):
        """An inverse of A up to a perturbation, against no preconditioner."""
        A = spd(30, 1e4, dtype=dtype)
        b = torch.randn(30, dtype=dtype)
        M = torch.linalg.inv(A + 0.1 * torch.diag(torch.rand(30, dtype=dtype)))
        x, info, products = solve(A, b, 100, 1e-3, M)
        _, plain, _ = solve(A, b, 100, 1e-3)
        assert info["iterations"] <= 3 < plain["iterations"]
        assert products == 1 + info["iterations"]
        assert residual(A, b, x) < 1.1e-3

    def test_converges_to_the_solution(self, dtype):
        """Improving on Mb, whatever M is."""
        A = spd(8, 50, dtype=dtype)
        b = torch.randn(8, dtype=dtype)
        for seed in range(20):
            x, info, _ = solve(A, b, 100, 1e3 * torch.finfo(dtype).eps, spd(8, 20, seed, dtype))
            assert residual(A, b, x) < 1e4 * torch.finfo(dtype).eps
            assert not info["negative_curvature"]

    def test_random_systems(self, dtype):
        """Indefinite or not, cut short or not: the residual is that of x, and by A's model x is no worse than Mb."""
        kinds = set()
        for seed in range(60):
            A = spd(8, 50, seed, dtype) - (seed % 3) * 2 * torch.eye(8, dtype=dtype)
            M = spd(8, 20, seed + 1000, dtype)
            b = torch.randn(8, dtype=dtype)
            x, info, _ = solve(A, b, 1 + seed % 5, 1e-3, M)
            assert info["residual"] == pytest.approx(residual(A, b, x), rel=1e-3, abs=1e-3)
            model, model_Mb = (v @ A @ v / 2 - b @ v for v in (x, M @ b))
            assert model <= model_Mb + 1e-4 * model_Mb.abs()
            kinds.add((not torch.equal(x, M @ b), bool(info["negative_curvature"])))
        assert kinds >= {(True, True), (True, False)}


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
class TestBrokenSystems:
    @pytest.fixture
    def M(self, dtype, preconditioned):
        return spd(10, 10, 1, dtype) if preconditioned else None

    def start(self, M, b):
        return 0 * b if M is None else M @ b

    def test_negative_definite_keeps_the_start(self, dtype, M):
        A = -spd(10, 10, dtype=dtype)
        b = torch.ones(10, dtype=dtype)
        x, info, _ = solve(A, b, M=M)
        assert torch.equal(x, self.start(M, b))
        assert info["negative_curvature"]
        assert info["iterations"] == 0
        assert info["residual"] == pytest.approx(residual(A, b, x), rel=1e-4)

    def test_indefinite_keeps_the_iterate(self, dtype, M):
        A = torch.diag(torch.tensor([5.0, 4.0, 3.0, 3.5, 4.5, 2.0, 2.5, 3.0, 4.0, -0.1], dtype=dtype))
        b = torch.ones(10, dtype=dtype)
        b[-1] = 0.01
        M = None if M is None else torch.diag(torch.linspace(0.2, 0.5, 10, dtype=dtype))
        x, info, _ = solve(A, b, M=M)
        assert x.isfinite().all()
        assert not torch.equal(x, self.start(M, b))
        assert info["negative_curvature"]
        assert 1 <= info["iterations"] < 10
        assert info["residual"] == pytest.approx(residual(A, b, x), rel=1e-3)

    def test_singular(self, dtype, M):
        """Without a solution, pᵀAp sinks into rounding noise: finite, and it says that nothing was solved."""
        for seed in range(20):
            q = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(seed)).double())[0]
            A = ((q[:, :9] * torch.linspace(1, 10, 9, dtype=torch.float64)) @ q[:, :9].T).to(dtype)
            x, info, _ = solve(A, q.sum(1).to(dtype), M=M)
            assert x.isfinite().all()
            assert info["negative_curvature"]
            assert 0.1 < info["residual"] < math.inf  # the null part is 1/√10 of b
        x, info, _ = solve(0 * A, torch.ones(10, dtype=dtype), M=M)
        assert torch.equal(x, self.start(M, torch.ones(10, dtype=dtype)))
        assert info["negative_curvature"]

    def test_zero_right_hand_side(self, dtype, M):
        x, info, _ = solve(spd(10, 10, dtype=dtype), torch.zeros(10, dtype=dtype), M=M)
        assert (x == 0).all()
        assert info["residual"] == 0
        assert info["iterations"] == 0
        assert not info["negative_curvature"]

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_not_finite(self, dtype, M, bad):
        """Nothing to keep: 0, an infinite residual and no NaN."""
        for where in ("A", "b") if M is None else ("A", "b", "M"):
            system = {"A": spd(10, 10, dtype=dtype), "b": torch.ones(10, dtype=dtype)}
            if M is not None:
                system["M"] = M.clone()
            system[where].view(-1)[0] = bad
            x, info, _ = solve(**system)
            assert (x == 0).all()
            assert info["residual"] == math.inf
            assert info["iterations"] == 0

    def test_not_finite_later_keeps_the_iterate(self, dtype, M):
        b = torch.ones(10, dtype=dtype)
        products = 2 if M is None else 3
        x, info, _ = solve(spd(10, 100, dtype=dtype), b, 10, 0.0, M, breaks_after=products)
        assert x.isfinite().all()
        assert not torch.equal(x, self.start(M, b))
        assert info["iterations"] == 2
        assert info["residual"] == math.inf

    def test_overflow(self, dtype, M):
        tiny = torch.finfo(dtype).tiny * torch.eye(10, dtype=dtype)
        b = torch.finfo(dtype).max / 100 * torch.ones(10, dtype=dtype)
        x, info, _ = solve(tiny, b, M=M)
        assert x.isfinite().all()
        assert not info["residual"].isnan()

    def test_masks_do_what_the_early_stop_does(self, dtype, M, monkeypatch):
        """What a compiled function runs: a fixed number of iterations, masked."""
        good = spd(10, 10, dtype=dtype)
        b = torch.ones(10, dtype=dtype)
        bad = b.clone()
        bad[0] = math.nan
        systems = [(good, b, 100), (good, b, 2), (good, bad, 100), (good, 0 * b, 100), (-good, b, 100)]
        last = torch.tensor([9])
        # solved before its negative curvature shows, which a solve that went on would meet
        systems += [(torch.ones(10, dtype=dtype).index_fill(0, last, -1).diag(), b.index_fill(0, last, 1e-6), 100)]
        systems += [(spd(10, 50, seed, dtype) - 4 * torch.eye(10, dtype=dtype), b, 100) for seed in range(5)]
        for A, b, max_iters in systems:
            for breaks_after in (0, 1, 3, math.inf):
                x, info, _ = solve(A, b, max_iters, 1e-5, M, breaks_after)
                with monkeypatch.context() as patch:
                    patch.setattr(torch.compiler, "is_compiling", lambda: True)
                    masked_x, masked_info, products = solve(A, b, max_iters, 1e-5, M, breaks_after)
                assert products == max_iters + (M is not None)
                assert torch.equal(x, masked_x)
                assert info == masked_info
