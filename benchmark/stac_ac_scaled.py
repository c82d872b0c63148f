"""A control for STAC: the total derivative's direction with the plain gradient's length.

Where it differs from STAC, that is a matter of step length; where it differs from AC at the same rate, it is not. All
else, flags included, is stac_ac.py's. Made by a launcher:

    SCRIPT=benchmark/stac_ac_scaled.py TAG=-scaled VARIANTS=stac-every-m1 benchmark/stac_ac.sh
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import stac_ac  # noqa: E402

exact = stac_ac.total_derivative


def scaled_derivative(direct, implicit):
    """direct - implicit, made as long as direct; info is that of the unscaled."""
    total, info = exact(direct, implicit)
    length = stac_ac.flatten(total).norm().clamp(min=1e-30)
    return [g * info["direct_norm"] / length for g in total], info


def main():
    stac_ac.total_derivative = scaled_derivative
    stac_ac.main()


if __name__ == "__main__":
    main()
