"""A control for STSAC-AL: the actor descends its influence on the average target, not on each.

With Gauss-Newton the implicit term is Σ_i df1/dy_i ∇_θy_i, and df1/dy comes of a linear system for each Q network. Here
df1/dy_i is replaced by its mean over the batch: of second order nothing is left but one number a network. All else,
flags included, is stsac.py's: --leader actor --curvature gauss-newton. Made by a launcher:

    SCRIPT=benchmark/stsac_mean.py TAG=-mean VARIANTS=stsac-al-gn benchmark/stsac.sh
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stsac  # noqa: E402

exact = stsac.ridge_solver


def mean_ridge_solver(K, damping):
    """c -> the mean of (K + damping I)⁻¹ c, for each of the samples."""
    solve = exact(K, damping)
    return lambda c: solve(c).mean().expand(len(c))


def main():
    stsac.ridge_solver = mean_ridge_solver
    stsac.main()


if __name__ == "__main__":
    main()
