"""What ranks of pretended nodes do in the tests of health checks. Importable, for the fork server."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from framework.environment import Environment
from framework.launch import device_checks, health_step


@dataclass(frozen=True)
class Break:
    """What is wrong with one rank. how: absent, it never comes; product, it multiplies wrongly; hang, its product never
    ends; mute, it ends in the all-reduce across nodes without a word; nan, one element isn't a number.
    """

    rank: int
    how: str


def check(env: Environment, folder: Path, per_node: int, broken: Break | None = None) -> float:
    """A rank's part of a health check, on the node that its number says. Returns the seconds that it took."""
    local_rank = env.rank % per_node
    os.environ["CUBOID_NODE"] = f"node{env.rank // per_node}"
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(local_rank), str(per_node)
    begin = time.monotonic()
    if broken is not None and broken.rank == env.rank:
        if broken.how == "absent":
            return 0.0
        put_in(broken.how)
    health_step.check_health(folder, Environment(env.rank, env.world_size, local_rank, None))
    return time.monotonic() - begin


def put_in(how: str) -> None:
    """Break this process."""
    multiply = device_checks.multiply

    def wrong(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        multiply(a, b, out)
        if how == "hang":
            time.sleep(600)
        out[3, 5] += torch.nan if how == "nan" else 1

    if how == "mute":
        from framework.launch import health_ranks

        health_ranks.go_across = lambda *_: None
    else:
        device_checks.multiply = wrong
