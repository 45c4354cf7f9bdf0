"""How often the intervals of a mean hold: once, and at a thousand looks.

    python benchmarks/intervals.py

Coverage and width of nominal 95% intervals for the mean of B draws, over Gaussian, skewed and zero-heavy kinds:
Student's t, Johnson's (1978) and Chen's (1995) corrections, Hall's (1992), the bootstrap-t, and the join of Hall's with
t that `skewed_interval` is. Widths are relative to t's, the median. Where all draws are equal every method returns the
whole line.

Then runs of 1,000 looks at a true zero: how many ever call a sign, by two standard errors and by `SignSequence`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy import stats

from lora_probe_callbacks.estimators import SignSequence
from lora_probe_callbacks.estimators.intervals import hall_and_t

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]
RESULT = Path(__file__).parent / "results" / "intervals.json"
RESAMPLES = 999


def _rare(draw: Draw) -> Draw:
    """70% are exactly zero, as where the responses of a group agree."""
    return lambda rng, shape: (rng.random(shape) < 0.3) * draw(rng, shape)


# Kind to draws and their mean.
KINDS: dict[str, tuple[Draw, float]] = {
    "gaussian": (lambda rng, shape: rng.normal(size=shape), 0.0),
    "lognormal": (lambda rng, shape: rng.lognormal(0, 1, shape), math.exp(0.5)),
    "zeros, else N(1, 1)": (_rare(lambda rng, shape: rng.normal(1, 1, shape)), 0.3),
    "zeros, else N(0, 1)": (_rare(lambda rng, shape: rng.normal(0, 1, shape)), 0.0),
    "zeros, else lognormal": (_rare(lambda rng, shape: rng.lognormal(0, 0.5, shape)), 0.3 * math.exp(0.125)),
}


def intervals(x: Array, rng: np.random.Generator) -> dict[str, tuple[Array, Array]]:
    """Return lower and upper ends of every method for samples [runs, B]."""
    B = x.shape[1]
    q = float(stats.t.ppf(0.975, B - 1))
    mean, error, skewness = moments(x)
    shift = skewness * error / (6 * math.sqrt(B))  # mu_3 / (6 s^2 B)
    # Chen: T' = T + a (1 + 2 T^2) + 4 a^2 (T + 2 T^3), a = skewness / (6 sqrt B); its ends are found on a grid.
    found = {
        "t": (mean - q * error, mean + q * error),
        "johnson": (mean + shift - q * error, mean + shift + q * error),
        "chen": chen(mean, error, skewness / (6 * math.sqrt(B)), q),
        "bootstrap-t": bootstrap_t(x, mean, error, rng),
        "hall": hall(mean, error, skewness / math.sqrt(B), q),
        "hall and t": hall_and_t(x, q),
    }
    equal = error <= 1e-14 * np.abs(mean)
    return {name: (np.where(equal, -np.inf, low), np.where(equal, np.inf, up)) for name, (low, up) in found.items()}


def moments(x: Array) -> tuple[Array, Array, Array]:
    """Return means, standard errors and skewnesses of samples [..., B]."""
    B = x.shape[-1]
    mean = x.mean(-1)
    d = x - mean[..., None]
    variance = (d**2).sum(-1) / (B - 1)
    third = (d**3).sum(-1) * B / ((B - 1) * (B - 2))
    return mean, np.sqrt(variance / B), third / np.maximum(variance, 1e-300) ** 1.5


def hall(mean: Array, error: Array, l: Array, q: float) -> tuple[Array, Array]:  # noqa: E741
    """Hall's interval alone."""
    l = np.where(np.abs(l) < 1e-6, 1e-6, l)  # noqa: E741
    low, high = (3 / l * (np.cbrt(1 + l * (end - l / 6)) - 1) for end in (q, -q))
    return mean - error * low, mean - error * high


def chen(mean: Array, error: Array, a: Array, q: float) -> tuple[Array, Array]:
    """The means between which Chen's corrected T stays within the quantiles, nearest to the sample's."""
    T = np.linspace(-12, 12, 2401)
    corrected = T + a[:, None] * (1 + 2 * T**2) + 4 * a[:, None] ** 2 * (T + 2 * T**3)
    # Increasing: its derivative 1 + 4 a T + 4 a^2 (1 + 6 T^2) has no zero.
    low = np.array([np.interp(q, row, T) for row in corrected])
    high = np.array([np.interp(-q, row, T) for row in corrected])
    return mean - error * low, mean - error * high


def bootstrap_t(x: Array, mean: Array, error: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Quantiles of T over resamples, equal tails."""
    runs, B = x.shape
    ends = np.empty((2, runs))
    places = [round(part * (RESAMPLES + 1)) - 1 for part in (0.025, 0.975)]
    for i in range(runs):
        m, se, _ = moments(x[i][rng.integers(0, B, (RESAMPLES, B))])
        with np.errstate(divide="ignore", invalid="ignore"):
            T = np.nan_to_num((m - mean[i]) / se, nan=0.0, posinf=np.inf, neginf=-np.inf)
        ends[:, i] = np.sort(T)[places]
    with np.errstate(invalid="ignore"):
        return mean - ends[1] * error, mean - ends[0] * error


def coverage(runs: int) -> list[dict[str, Any]]:
    """Return a row for every kind and B."""
    rows = []
    for B in (8, 16, 32):
        for kind, (draw, truth) in KINDS.items():
            rng = np.random.default_rng(B)
            x = draw(rng, (runs, B))
            found = intervals(x, rng)
            width = np.median(found["t"][1] - found["t"][0])
            methods = {
                name: {
                    "coverage": round(float(((low <= truth) & (truth <= up)).mean()), 4),
                    "width": round(float(np.median(up - low) / width), 3),
                }
                for name, (low, up) in found.items()
            }
            rows.append({"B": B, "kind": kind, **methods})
    return rows


# A true zero, seen by B draws at each look; the scale of the draws by look.
ZEROS: dict[str, tuple[Draw, Callable[[int], float]]] = {
    "gaussian": (KINDS["gaussian"][0], lambda t: 1.0),
    "lognormal": (lambda rng, shape: rng.lognormal(0, 1, shape) - math.exp(0.5), lambda t: 1.0),
    "zeros, else exponential": (_rare(lambda rng, shape: rng.exponential(size=shape) - 1), lambda t: 1.0),
    "zeros, else lognormal": (_rare(lambda rng, shape: rng.lognormal(0, 1, shape) - math.exp(0.5)), lambda t: 1.0),
    "lognormal, warm-up": (
        lambda rng, shape: rng.lognormal(0, 1, shape) - math.exp(0.5),
        lambda t: min(1.0, (t + 1) / 100),
    ),
    "gaussian, decay": (KINDS["gaussian"][0], lambda t: 1 - t / 1010),
}


def looks(runs: int, count: int = 1000) -> Iterator[dict[str, Any]]:
    """Yield a row for every kind and B: the part of the runs that ever calls a sign."""
    for B in (4, 8, 16):
        for kind, (draw, scale) in ZEROS.items():
            rng = np.random.default_rng(B)
            two, fifty, sure = 0, 0, 0
            scales = np.array([scale(t) for t in range(count)])[:, None]
            for _ in range(runs):
                mean, error, _ = moments(draw(rng, (count, B)) * scales)
                beyond = (np.abs(mean) > 2 * error) & (error > 0)
                two, fifty = two + bool(beyond.any()), fifty + bool(beyond[:50].any())
                sequence = SignSequence()
                for m, se in zip(mean.tolist(), error.tolist(), strict=True):
                    sequence.add(m, se)
                sure += sequence.sure != 0
            yield {
                "B": B,
                "kind": kind,
                "two_errors_50_looks": round(fifty / runs, 4),
                "two_errors_1000_looks": round(two / runs, 4),
                "sequence_1000_looks": round(sure / runs, 4),
            }


def power(runs: int = 200) -> list[dict[str, float]]:
    """Looks until the sign of a mean of z standard errors is sure, the median."""
    rows = []
    for z in (0.25, 0.5, 1.0, 2.0):
        rng = np.random.default_rng(0)
        needed = []
        for _ in range(runs):
            sequence = SignSequence()
            looked = 0
            while not sequence.sure and looked < 2000:
                sequence.add(z + float(rng.normal()), 1.0)
                looked += 1
            needed.append(looked)
        rows.append({"signal": z, "looks": float(np.median(needed))})
    return rows


def main() -> None:
    """Simulate, print and write."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--runs", type=int, default=10000, help="samples for each kind and B")
    arguments.add_argument("--sequences", type=int, default=2000, help="runs of 1,000 looks for each kind and B")
    arguments.add_argument("--output", type=Path, default=RESULT)
    options = arguments.parse_args()
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "runs": options.runs,
        "sequences": options.sequences,
        "coverage": coverage(options.runs),
        "looks": list(looks(options.sequences)),
        "power": power(),
    }
    for row in result["coverage"]:
        methods = {k: f"{v['coverage']:.3f} x{v['width']:.2f}" for k, v in row.items() if isinstance(v, dict)}
        print(row["B"], row["kind"], methods)
    for row in (*result["looks"], *result["power"]):
        print(row)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
