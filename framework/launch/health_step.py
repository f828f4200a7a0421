"""One process's part of a health check, as `cuboid health FOLDER` starts it. See health.py."""

import time
from pathlib import Path

from framework.environment import Environment, local_world_size, master_address, node_name
from framework.launch.health import read_request
from framework.launch.health_draft import LOCAL, MEET, Draft, Place, meet, open_meeting
from framework.launch.node_checks import check_node


def check_health(folder: Path, env: Environment) -> None:
    """This process's part of a check. What it finds is in the report, a problem is no failure of the command."""
    request = read_request(folder)
    place = Place(node_name(), env.rank, env.local_rank, local_world_size(), master_address(), time.monotonic())
    draft = Draft(folder, request, place)
    if request.health.level == "full":
        from framework.launch.health_ranks import check_ranks

        check_ranks(folder, draft)
    elif place.leads:
        check_basic(draft)


def check_basic(draft: Draft) -> None:
    """Without torch, by a node's first process alone."""
    place, request = draft.place, draft.request
    meeting = open_meeting(draft, store=0)
    draft.begin("its own checks", LOCAL, blames=True)
    draft.add(check_node(request.health, Path(request.scratch)))
    draft.write("local")
    meet(draft)
    draft.write("done", ended=True)
    draft.begin("waiting for the others", 1.0, blames=False)
    while meeting is not None and place.rank == 0 and time.monotonic() < draft.until(MEET):
        if len(meeting.nodes) >= len(request.nodes) - 1:
            break
        time.sleep(0.05)
    draft.begin("", float("inf"), blames=False)
