"""`cuboid submit`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from framework import log
from framework.launch.chain import build_chain, submit_chain
from framework.launch.cluster import load_cluster
from framework.launch.config import ClusterConfig
from framework.launch.job import Job
from framework.launch.script import script_of
from framework.launch.snapshot import snapshot_path
from framework.launch.submit import Request, build_job, check_free, discard, submit_all, summary, write_job
from framework.launch.sweep import read_sweep
from framework.recipe import load_recipe
from framework.run import Resolved, resolve_invocation

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
def submit(
    recipe: Annotated[Path, typer.Argument(help="Recipe file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to set.")] = None,
    *,
    cluster: Annotated[Path, typer.Option(help="The cluster's file, as in slurm/clusters/.")],
    nodes: Annotated[
        str | None, typer.Option(help="How many: 4, or 2-4 with mesh.dp=auto; default: by the mesh.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script and what it would start.")] = False,
    array: Annotated[Path | None, typer.Option(help="A sweep's file: a run for each of its entries.")] = None,
    after: Annotated[Path | None, typer.Option(help="Start when this run has ended well.")] = None,
) -> None:
    """Train on a Slurm cluster: check, submit, and come back by itself after preemption, time limits and failures."""
    words, found, request = list(overrides or []), load_cluster(cluster), Request(nodes, after)
    jobs: list[Job] = []
    for number, row in enumerate(read_sweep(array)) if array is not None else [(-1, [])]:
        if array is not None and any(word.startswith("run=") for word in row):
            raise ValueError(f"{array}, entry {number}: run= is made of the recipe's run and the entry's number")
        named = [f"run={load_recipe(recipe, words).run}-{number:03}"] if number >= 0 else []
        invocation = resolve_invocation(recipe, [*words, *row, *named])
        if invocation.recipe.stages:
            if array is not None:
                raise ValueError(
                    f"--array {array}: each stage of a run is a job of its own: submit the runs one by one"
                )
            submit_stages(invocation, found, request, dry_run=dry_run)
            return
        job, notes = build_job(invocation, found, request)
        if number <= 0:
            for note in (*invocation.notes, *notes):
                log.line(note)
        if dry_run:
            job = replace(job, code=str(snapshot_path(Path(job.folder).parent)))
        else:
            check_free(Path(job.run))
            job = write_job(job, invocation.recipe)
        jobs.append(job)
    if len({job.nodes for job in jobs}) > 1:
        raise ValueError(f"--array {array}: its runs need different numbers of nodes: submit them one by one")
    if dry_run:
        log.line(script_of(jobs[0]))
    for line in summary(jobs[0], invocation.recipe):
        log.line(line)
    if dry_run:
        return
    try:
        ids = submit_all(jobs)
    except ValueError:
        for job in jobs:
            discard(job)
        raise
    for job, job_id in zip(jobs, ids, strict=True):
        log.line(f"submitted {job.run} as job {job_id}; `cuboid status {job.run}` tells how it goes")


def submit_stages(invocation: Resolved, cluster: ClusterConfig, request: Request, *, dry_run: bool) -> None:
    """A job for each stage that is left, each waiting for the one before."""
    links, notes = build_chain(invocation, cluster, request)
    for note in (*invocation.notes, *notes):
        log.line(note)
    for link in links:
        if dry_run:
            log.line(script_of(replace(link.job, code=str(snapshot_path(Path(link.job.folder).parent)))))
        for line in link.lines():
            log.line(line)
    if dry_run:
        return
    run = Path(links[0].job.run)
    check_free(run)
    for link, job_id in zip(links, submit_chain(links, invocation.recipe), strict=True):
        log.line(f"submitted stage {link.stage.name} of {run} as job {job_id}")
    log.line(f"`cuboid status {run}` tells how it goes")
