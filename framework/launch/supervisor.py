"""In the batch script: attempts, one after another, on the nodes of the allocation.

    nodes -> health checks -> claim an attempt -> srun, a task a rank -> watch -> how it ended -> what follows

What follows a failure is another attempt on the nodes that are left, spare ones included, without a wait in the
queue; the queue only where too few are left, or where failures repeat. Everything that happens goes into
RUN/jobs/history.jsonl.
"""

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Final

from framework.checkpoint.attempt import claim_attempt
from framework.environment import Allocation, read_allocation
from framework.failure import first_failure
from framework.heartbeat import read_heartbeat
from framework.history import Event, EventName, History, Outcome, now
from framework.launch import slurm
from framework.launch.checkup import check_nodes
from framework.launch.deputy import stay_alive
from framework.launch.job import Job
from framework.launch.nodes import nodes_path, remember
from framework.launch.placement import order_hosts, usable_nodes
from framework.launch.script import python_of
from framework.launch.step import Step, start_step
from framework.launch.stragglers import SlowNode, Stragglers
from framework.launch.variables import rank_environment
from framework.launch.verdict import Ended, Evidence, Next, decide, judge, lost_nodes, slow_words
from framework.launch.watch import watch_step
from framework.log import line
from framework.run import Run, latest_attempt, read_verdict
from framework.storage.storage import open_storage

MOMENT = 3.0  # seconds
STATUS: Final = MappingProxyType({"done": 0, "cancelled": 143})


class Told:
    """Whether this job has been told to end: by a person, or by the scheduler, which then does what follows."""

    def __init__(self) -> None:
        self.yes = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)
        for number in (signal.SIGUSR2, signal.SIGCONT):  # for the ranks, which get it too
            signal.signal(number, signal.SIG_IGN)

    def wait(self) -> None:
        """The ranks were told: the scheduler tells them first, and this process within a moment."""
        deadline = time.monotonic() + MOMENT
        while not self.yes and time.monotonic() < deadline:
            time.sleep(0.05)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.yes = True


@dataclass
class Supervisor:
    """One start of a job. bad: nodes of the allocation that aren't used any more, with why; avoided: slow ones."""

    job: Job
    allocation: Allocation
    nodes: tuple[str, ...]
    told: Told
    bad: dict[str, str] = field(default_factory=dict)
    avoided: set[str] = field(default_factory=set)
    deputy: Step | None = None

    @property
    def path(self) -> Path:
        return Path(self.job.run)

    @property
    def history(self) -> History:
        return History(self.path)

    def run(self) -> int:
        """Until nothing follows here. The batch script's exit status."""
        self.history.add(replace(self._event("started"), restart=self.allocation.restart, nodes=self.nodes))
        while True:
            hosts = self._hosts()
            if self.told.yes or self._is_cancelled():
                return self._told_before_start()
            if hosts is None:
                return self._requeue(Next("requeue", "retry", self._too_few()))
            self._have_deputy(hosts)
            past = self.history.events()
            try:
                ended = self._attempt(hosts)
            except ValueError as error:
                return self._finish("fatal", str(error))
            except OSError as error:
                ended = Ended("retry", str(error), kind="storage")
            if self._is_replaced():
                line("another start of this job has taken over: this one says nothing more")
                return 1
            self._note_end(ended)
            for node in ended.bad:
                self._exclude(node, ended.reason)
            if ended.suspect and repeats(past, ended.suspect):
                self._exclude(ended.suspect, f"at fault twice in a row: {ended.reason}")
            limits = self.job.cluster
            following = decide(ended, past, restarts=limits.restarts, requeues=limits.requeues)
            if following.what == "finish":
                return self._finish(following.outcome, following.reason, step=ended.step)
            if following.what == "requeue":
                return self._requeue(following)
            line(f"starting again on the nodes that are left: {following.reason}")

    def _hosts(self) -> tuple[str, ...] | None:
        """The nodes of the next attempt, in the order of the ranks; None where too few are left."""
        for node in slurm.gone_nodes(self._left()):
            self._exclude(node, "lost, says the scheduler")
        left = self._left()
        switches = dict.fromkeys(left, "")
        if left and self.job.cluster.health.level != "off":
            for report in check_nodes(self.job, self.allocation, left):
                switches[report.node] = report.switch
                for problem in report.problems[:1]:
                    self._exclude(report.node, problem)
        healthy = {node: switches[node] for node in self._left()}
        (fewest, most), ranks, mesh = self.job.nodes, self.job.cluster.ranks_per_node, self.job.mesh
        if len(healthy) < fewest:
            return None
        count = usable_nodes(len(healthy), ranks, mesh, range(fewest, most + 1), splits=self.job.splits)
        span = -(-mesh.ring * mesh.ulysses * mesh.tp // ranks)
        return tuple(order_hosts(healthy, nodes_per_replica=span)[:count])

    def _attempt(self, hosts: tuple[str, ...]) -> Ended:
        """Start ranks, watch them, and say how it ended."""
        run = Run(self.path, claim_attempt(self.path, open_storage(self.job.store)))
        ranks = self.job.cluster.ranks_per_node
        self.history.add(replace(self._event("launched"), attempt=run.attempt, nodes=hosts, ranks=len(hosts) * ranks))
        line(f"attempt {run.attempt}: {len(hosts) * ranks} ranks on {' '.join(hosts)}")
        run.failures.mkdir(exist_ok=True)
        own = {
            **rank_environment(self.job.cluster, self.allocation.user, attempt=run.attempt_path),
            "CUBOID_RUN": self.job.run,
            "CUBOID_ATTEMPT": str(run.attempt),
            "CUBOID_FAILURES": str(run.failures),
        }
        logs = run.attempt_path / "logs"
        step = start_step(
            self.job, self.allocation.job, hosts, self.job.command, tasks_a_node=ranks, logs=logs, own=own
        )
        health = self.job.cluster.health
        swap = len(self._left()) > self.job.nodes[0]
        stragglers = Stragglers(hosts, limit=health.slow, times=health.times)
        seen = watch_step(step, run, self.job.watch, stragglers, swap=swap)
        if seen.slow is not None and not swap:
            self._avoid(seen.slow)
        verdict = read_verdict(run)
        if verdict is not None and verdict.signal == signal.SIGTERM:
            self.told.wait()
        lost = {*lost_nodes(step.said()), *slurm.gone_nodes(hosts)}
        return judge(
            Evidence(
                status=step.client.returncode,
                srun=step.said(),
                verdict=verdict,
                failure=first_failure(run.failures),
                beat=read_heartbeat(run),
                hang=seen.hang,
                slow=seen.slow if swap else None,
                lost=tuple(node for node in hosts if node in lost),
                told=self.told.yes,
                cancelled=self._is_cancelled(),
            )
        )

    def _have_deputy(self, hosts: tuple[str, ...]) -> None:
        """Where the job outlives its first node, a task on another one that puts it back into the queue then."""
        others = [host for host in (*hosts, *self._left()) if host != self.nodes[0]]
        if not self.job.survives or not others or (self.deputy is not None and self.deputy.client.poll() is None):
            return
        folder = Path(self.job.folder)
        words = (str(folder), self.job.run, self.allocation.job, self.nodes[0])
        command = (python_of(self.job.cluster), "-m", "framework.launch.deputy", *words)
        logs = folder / "deputy"
        self.deputy = start_step(
            self.job, self.allocation.job, (others[0],), command, tasks_a_node=1, logs=logs, own={}, tolerant=True
        )

    def _left(self) -> tuple[str, ...]:
        """The nodes that are used."""
        return tuple(node for node in self.nodes if node not in self.bad)

    def _too_few(self) -> str:
        bad = "; ".join(f"{node}: {why}" for node, why in self.bad.items())
        return f"{len(self._left())} of {len(self.nodes)} nodes are left, {self.job.nodes[0]} are needed ({bad})"

    def _exclude(self, node: str, reason: str) -> None:
        """Use a node no more, neither here nor, for a time, in other jobs."""
        if node not in self.bad:
            self.bad[node] = reason
            self.history.add(replace(self._event("excluded"), node=node, reason=reason))
            line(f"{node} isn't used any more: {reason}")
            cluster = self.job.cluster
            remember(nodes_path(cluster), node, reason, time.time(), cluster.health.expiry)

    def _avoid(self, slow: SlowNode) -> None:
        """Use a slow node while there is none to take its place, but not in the next start of any job."""
        cluster = self.job.cluster
        self.avoided.add(slow.node)
        self.history.add(replace(self._event("excluded"), node=slow.node, reason=slow_words(slow)))
        remember(nodes_path(cluster), slow.node, slow_words(slow), time.time(), cluster.health.expiry)

    def _told_before_start(self) -> int:
        if self._is_cancelled():
            return self._finish("cancelled", "cancelled before ranks were started")
        return self._requeue(Next("requeue", "preempted", "told to end before ranks were started"))

    def _is_cancelled(self) -> bool:
        """Whether a person has said so (`cuboid cancel`), or this job was told to end and isn't to come back."""
        job, restart = self.allocation.job, self.allocation.restart
        asked = any(event.event == "cancelled" and event.job == job for event in self.history.events())
        return asked or (self.told.yes and not slurm.comes_back(job, restart))

    def _is_replaced(self) -> bool:
        """Whether this is what is left of a start whose node the scheduler holds for lost: nobody told it to end."""
        return not self.told.yes and slurm.comes_back(self.allocation.job, self.allocation.restart)

    def _requeue(self, following: Next) -> int:
        """Back into the queue, without the bad nodes. A status other than 0 where the scheduler refuses."""
        self.history.add(replace(self._event("requeued"), outcome=following.outcome, reason=following.reason))
        line(f"back into the queue: {following.reason}")
        if self.told.yes:  # the scheduler has done so by itself
            return 0
        try:
            slurm.requeue(self.allocation.job, sorted({*self.job.exclude, *self.bad, *self.avoided}))
        except OSError as error:
            return self._finish("retry", f"{error}; {following.reason}")
        return 0

    def _finish(self, outcome: Outcome, reason: str, *, step: int | None = None) -> int:
        """The end of the job."""
        self.history.add(replace(self._event("finished"), outcome=outcome, reason=reason, step=step))
        line(f"{outcome}: {reason}")
        return STATUS.get(outcome, 1)

    def _note_end(self, ended: Ended) -> None:
        attempt = latest_attempt(self.path)
        self.history.add(
            replace(
                self._event("ended"),
                attempt=attempt,
                outcome=ended.outcome,
                reason=ended.reason,
                step=ended.step,
                node=ended.suspect,
                kind=ended.kind,
            )
        )
        line(f"attempt {attempt} ended, {ended.outcome}: {ended.reason}")

    def _event(self, name: EventName) -> Event:
        return Event(name, now(), job=self.allocation.job)


def repeats(past: Sequence[Event], suspect: str) -> bool:
    """Whether the attempt before named the same node."""
    return next((event.node for event in reversed(past) if event.event == "ended"), None) == suspect


def supervise(job: Job) -> None:
    """What the batch script runs. Ends the process with the job's exit status."""
    allocation, told = read_allocation(), Told()
    stay_alive(Path(job.folder))
    status = Supervisor(job, allocation, slurm.expand(allocation.nodes), told).run()
    if status:
        raise SystemExit(status)
