"""Effective training time as a function of restart time and save stall, from 8 GPUs to 16,384.

    python tools/bench/goodput.py [--run RUN] [--stall S --write S --detect S --restart S] [--png FILE] [--csv FILE]

A run loses to its failures what a framework decides: the stall of each save (s), the seconds until a checkpoint
counts (w, from the copy to the commit), those until a failure is seen (d) and those of a restart, up to the first step
(R). The rest is the cluster's: M, the mean time to a failure, which grows shorter with the number of GPUs.

Failures are a Poisson process of mean M while ranks are there, restarts included. A save begins after every tau
seconds of steps. A failure v seconds after ranks were started leaves the checkpoints that were committed by then, those
k with R + k (tau + s) + w <= v, so that

    E[kept]  = tau sum_k exp(-(R + k (tau + s) + w) / M) = tau exp(-(R + w) / M) / (exp((tau + s) / M) - 1)
    E[spent] = M + d
    effective training time = E[kept] / E[spent]

which for w = d = 0 is the exact model of J. T. Daly, "A higher order estimate of the optimum checkpoint interval for
restart dumps", Future Generation Computer Systems 22 (2006). The interval is the first-order optimum of
J. W. Young, Communications of the ACM 17 (1974), which Daly begins with: tau = sqrt(2 s M), or w where that is
longer, since one save runs at a time. The bench draws failures one by one and compares (`simulate`): the mean
agrees within four standard errors, or it ends with status 1.

M is interpolated, log M by log GPUs, between what Kokolis et al., "Revisiting Reliability in Large-Scale Machine
Learning Research Clusters" (arXiv 2410.21680), report for jobs on A100s: 8 GPUs 47.7 days, 1,024 7.9 hours, 16,384 1.8
hours. Other clusters are others: --mttf GPUS=HOURS ... takes your own.

With --run the four times are those of the run's own account (framework/launch/account.py), on the machine that it ran
on: a restart's time there is dominated by imports and compilation, not by the number of ranks.
"""

import argparse
import csv
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np

from framework.launch.account import Account
from framework.launch.facts import read_facts
from framework.launch.status import status_of
from framework.run import recipe_of_run

PUBLISHED = ((8, 47.7 * 24), (1024, 7.9), (16384, 1.8))  # GPUs, hours: arXiv 2410.21680
SIZES = (8, 64, 256, 1024, 4096, 16384)
RESTARTS = (30, 60, 120, 180, 300, 600)
STALLS = (0.1, 0.5, 1, 3, 10, 30, 60)
SIGMAS = 4.0


@dataclass(frozen=True)
class Times:
    """Seconds: stall of a save, from its copy to its commit, until a failure is seen, from there to the first step."""

    stall: float = 0.5
    write: float = 30.0
    detect: float = 10.0
    restart: float = 60.0


def mttf(gpus: int, points: tuple[tuple[int, float], ...] = PUBLISHED) -> float:
    """Seconds between two failures of a job, interpolated and, outside, extended by the nearest two points."""
    if len(points) == 1:
        return 3600 * points[0][1] * points[0][0] / gpus
    index = min(max(sum(gpus > at for at, _ in points), 1), len(points) - 1)
    (a, hours_a), (b, hours_b) = points[index - 1], points[index]
    slope = math.log(hours_b / hours_a) / math.log(b / a)
    return 3600 * hours_a * (gpus / a) ** slope


def best_interval(times: Times, m: float) -> float:
    """Young's, in seconds of steps; no shorter than a save takes."""
    return max(math.sqrt(2 * times.stall * m), times.write, 1.0)


def effective(times: Times, m: float, tau: float) -> float:
    """The expectation above."""
    kept = tau * math.exp(-(times.restart + times.write) / m) / math.expm1((tau + times.stall) / m)
    return kept / (m + times.detect)


def simulate(times: Times, m: float, tau: float, *, failures: int, seed: int) -> tuple[float, float]:
    """The same from failures that were drawn, second by second of no formula: (mean, standard error).

    Each failure is one cycle: ranks start, restore for R, then steps and saves alternate until the failure; what is
    kept is the newest checkpoint that was committed. The error is that of a ratio of means (delta method).
    """
    random = np.random.default_rng(seed)
    kept, spent = np.zeros(failures), np.zeros(failures)
    for index, alive in enumerate(random.exponential(m, failures)):
        clock, done, committed = times.restart, 0.0, 0.0
        pending: list[tuple[float, float]] = []  # when it is committed, work in it
        while clock + tau <= alive:
            clock, done = clock + tau, done + tau
            clock += times.stall
            pending.append((clock + times.write, done))
            while pending and pending[0][0] <= clock:
                committed = pending.pop(0)[1]
        for at, work in pending:
            committed = work if at <= alive else committed
        kept[index], spent[index] = committed, alive + times.detect
    ratio = kept.mean() / spent.mean()
    return float(ratio), float((kept - ratio * spent).std(ddof=1) / spent.mean() / math.sqrt(failures))


def measured(run: Path, now: float) -> tuple[Times, Account, list[str]]:
    """The times of a run, and lines that say what they were measured on. Raises ValueError where it never saved."""
    status = status_of(read_facts(run, now))
    account, every = status.account, recipe_of_run(run).checkpoint.every
    saves = max(account.num_steps // every, 1 if account.parts["save"] else 0)
    if not saves:
        raise ValueError(f"{run} has saved nothing: there is no stall to measure")
    found = Times(stall=account.parts["save"] / saves)
    lines = [f"{run}: {account.num_steps} steps, about {saves} saves, {len(account.restarts)} restarts"]
    if account.restarts:
        found = replace(
            found,
            detect=mean(restart.detect for restart in account.restarts),
            restart=mean(restart.seconds for restart in account.restarts),
        )
        for part in account.restarts[0].parts:
            seconds = mean(restart.parts[part] for restart in account.restarts)
            lines.append(f"  {part:12} {seconds:8.2f} s a restart")
    else:
        lines.append("  no restart: detection and restart as given")
    return found, account, lines


def check(times: Times, sizes: list[int], points: tuple[tuple[int, float], ...], failures: int) -> list[str]:
    """The formula against drawn failures; a line a size. Raises ValueError where they differ."""
    lines = []
    for gpus in sizes:
        m = mttf(gpus, points)
        tau = best_interval(times, m)
        exact = effective(times, m, tau)
        drawn, error = simulate(times, m, tau, failures=failures, seed=gpus)
        off = (drawn - exact) / error
        lines.append(f"  {gpus:6} GPUs: formula {exact:.4%}, drawn {drawn:.4%} +- {error:.4%} ({off:+.1f} errors)")
        if abs(off) > SIGMAS:
            raise ValueError(f"the formula and {failures} drawn failures differ: {lines[-1].strip()}")
    return lines


def curve(times: Times, field: str, values: tuple[float, ...], m: float) -> list[float]:
    """Effective training time over one of the times, each at its own best interval."""
    found = []
    for value in values:
        at = replace(times, **{field: value})
        found.append(effective(at, m, best_interval(at, m)))
    return found


def table(title: str, heads: tuple[float, ...], rows: list[tuple[int, list[float]]]) -> None:
    print(f"\n{title}")
    print(f"  {'GPUs':>6}  " + "".join(f"{head:>8g}" for head in heads))
    for gpus, values in rows:
        print(f"  {gpus:6}  " + "".join(f"{100 * value:8.2f}" for value in values))


def parse_points(words: list[str]) -> tuple[tuple[int, float], ...]:
    """1024=7.9 -> (1024, 7.9), by GPUs. Raises ValueError."""
    try:
        return tuple(sorted((int(gpus), float(hours)) for gpus, hours in (word.split("=") for word in words)))
    except ValueError:
        raise ValueError(f"--mttf {' '.join(words)}: give GPUS=HOURS, as in 1024=7.9") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--run", type=Path, help="measure on this run")
    for name in Times.__dataclass_fields__:
        parser.add_argument(f"--{name}", type=float, help="seconds, in place of what was measured")
    parser.add_argument("--mttf", nargs="+", metavar="GPUS=HOURS", help="in place of the published ones")
    parser.add_argument("--failures", type=int, default=20_000, help="drawn for each check")
    parser.add_argument("--png", type=Path, help="draw both curves")
    parser.add_argument("--csv", type=Path, help="write both tables")
    words = parser.parse_args()
    times, origin = Times(), "assumed"
    if words.run is not None:
        times, account, lines = measured(words.run, time.time())
        origin = f"measured on {words.run}, whose own effective training time was {account.ratio:.1%}"
        print("\n".join(lines))
    given = {name: getattr(words, name) for name in Times.__dataclass_fields__ if getattr(words, name) is not None}
    times = replace(times, **given)
    points = parse_points(words.mttf) if words.mttf else PUBLISHED
    print(f"times: {times} ({origin}{', ' + ', '.join(given) + ' as given' if given else ''})")
    source = "as given" if words.mttf else "arXiv 2410.21680"
    print(f"MTTF: {', '.join(f'{gpus} GPUs {hours:g} h' for gpus, hours in points)} ({source}), between them log-log")
    print("failures: Poisson, any one ends the attempt; the same number of GPUs goes on")
    for gpus in SIZES:
        m = mttf(gpus, points)
        tau = best_interval(times, m)
        print(f"  {gpus:6} GPUs: MTTF {m / 3600:8.2f} h, save every {tau:7.0f} s, {effective(times, m, tau):.2%}")
    over_restart = [(gpus, curve(times, "restart", RESTARTS, mttf(gpus, points))) for gpus in SIZES]
    over_stall = [(gpus, curve(times, "stall", STALLS, mttf(gpus, points))) for gpus in SIZES]
    table(f"effective training time, %, by restart time in s (stall {times.stall:g} s)", RESTARTS, over_restart)
    table(f"effective training time, %, by stall of a save in s (restart {times.restart:g} s)", STALLS, over_stall)
    print("\nformula against drawn failures:")
    print("\n".join(check(times, list(SIZES), points, words.failures)))
    if words.csv is not None:
        with words.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["over", "seconds", *(f"{gpus}_gpus" for gpus in SIZES)])
            for name, values, rows in (("restart", RESTARTS, over_restart), ("stall", STALLS, over_stall)):
                for index, value in enumerate(values):
                    writer.writerow([name, value, *(f"{found[index]:.6f}" for _, found in rows)])
    if words.png is not None:
        from chart import Panel, draw

        panels = [
            Panel("restart time, s", RESTARTS, over_restart),
            Panel("stall of a save, s", STALLS, over_stall),
        ]
        draw(words.png, "effective training time, %", panels)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
