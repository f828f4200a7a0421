"""In the batch script: attempts, one after another, on the nodes of the allocation.

    nodes -> health checks -> claim an attempt -> srun, a task a rank -> watch -> how it ended -> what follows

What follows a failure is another attempt on the nodes that are left, spare ones included, without a wait in the
queue; the queue only where too few are left, or where failures repeat. Everything that happens goes into
RUN/jobs/history.jsonl.
"""

import signal
import time
import traceback
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
from framework.launch.nodes import excluded, nodes_path, remember
from framework.launch.placement import order_hosts, usable_nodes
from framework.launch.script import python_of
from framework.launch.step import Step, start_step
from framework.launch.stragglers import Stragglers
from framework.launch.variables import rank_environment
from framework.launch.verdict import Ended, Evidence, Next, decide, judge, lost_nodes, slow_words
from framework.launch.watch import watch_step
from framework.log import line
from framework.run import Run, latest_attempt, read_verdict
from framework.storage.storage import open_storage

MOMENT = 3.0  # seconds
ASK = 2.0  # seconds between two looks at what has been asked
PATIENCE: Final = (5.0, 20.0, 60.0)  # seconds between tries of what the machines refuse
DEPUTIES = 3
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
    """One start of a job. bad: nodes of the allocation that aren't used any more, with why; avoided: to be kept away
    from in later starts. looked: when it was last seen what is asked. back: whether the job is in the queue again.
    """

    job: Job
    allocation: Allocation
    nodes: tuple[str, ...]
    told: Told
    bad: dict[str, str] = field(default_factory=dict)
    avoided: set[str] = field(default_factory=set)
    deputy: Step | None = None
    looked: float = 0.0
    pauses: int = 0
    back: bool = False

    @property
    def path(self) -> Path:
        return Path(self.job.run)

    @property
    def history(self) -> History:
        return History(self.path)

    def run(self) -> int:
        """Until nothing follows here. The batch script's exit status."""
        self._note(replace(self._event("started"), restart=self.allocation.restart, nodes=self.nodes))
        while True:
            past = self.history.events()
            began = time.monotonic()
            try:
                hosts = self._hosts()
                if self.told.yes or self._is_cancelled():
                    return self._told_before_start()
                ended = Ended("retry", self._too_few(), kind="nodes") if hosts is None else self._attempt(hosts)
            except ValueError as error:
                return self._finish("fatal", str(error))
            except OSError as error:
                self.told.wait()  # what was told to end ends steps first
                if self.told.yes:
                    return self._told_before_start()
                ended = Ended("retry", str(error), kind="storage")
            if self._is_replaced():
                line("another start of this job has taken over: this one says nothing more")
                return 1
            self._note_end(ended)
            for node in ended.bad:
                self._exclude(node, ended.reason, remembered=ended.kind != "node")
            if ended.suspect and repeats(past, ended.suspect):
                self._exclude(ended.suspect, f"at fault twice in a row: {ended.reason}")
            limits = self.job.cluster
            restarts = 0 if ended.kind == "nodes" else limits.restarts
            following = decide(ended, past, restarts=restarts, requeues=limits.requeues)
            if following.what == "finish":
                return self._finish(following.outcome, following.reason, step=ended.step)
            if following.what == "requeue":
                return self._requeue(following)
            line(f"starting again on the nodes that are left: {following.reason}")
            if ended.kind in ("storage", "unknown") and time.monotonic() - began < PATIENCE[-1]:
                self._pause()

    def fail(self, trace: str) -> int:
        """The end of a job whose supervisor itself went wrong."""
        line(trace)
        return self._finish("fatal", f"the supervisor failed: {trace.strip().splitlines()[-1]}")

    def _hosts(self) -> tuple[str, ...] | None:
        """The nodes of the next attempt, in the order of the ranks; None where too few are left."""
        for node in slurm.gone_nodes(self._left()):
            self._exclude(node, "lost, says the scheduler", remembered=False)
        left = self._left()
        switches = dict.fromkeys(left, "")
        if left and self.job.cluster.health.level != "off":
            reports = check_nodes(self.job, self.allocation, left)
            if self.told.yes or self._is_cancelled():
                return None  # the checks were ended with the job, and say nothing of nodes
            # Where all fail, it is as likely to be what they share: they are tried again, and nobody remembers them.
            some = not all(report.problems for report in reports)
            for report in reports:
                switches[report.node] = report.switch
                for problem in report.problems[:1]:
                    self._exclude(report.node, problem, remembered=some)
        healthy = {node: switches[node] for node in self._left()}
        (fewest, most), ranks, mesh = self.job.nodes, self.job.cluster.ranks_per_node, self.job.mesh
        if len(healthy) < fewest:
            return None
        count = usable_nodes(len(healthy), ranks, mesh, range(fewest, most + 1), splits=self.job.splits)
        span = -(-mesh.ring * mesh.ulysses * mesh.tp // ranks)
        return tuple(order_hosts(healthy, nodes_per_replica=span)[:count])

    def _attempt(self, hosts: tuple[str, ...]) -> Ended:
        """Start ranks, watch them, and say how it ended."""
        self._have_deputy(hosts)
        run = Run(self.path, claim_attempt(self.path, open_storage(self.job.store)))
        ranks = self.job.cluster.ranks_per_node
        self._note(replace(self._event("launched"), attempt=run.attempt, nodes=hosts, ranks=len(hosts) * ranks))
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
        try:
            seen = watch_step(step, run, self.job.watch, stragglers, swap=swap, look=lambda: self._look(step))
        finally:
            if step.client.poll() is None:
                step.end()
            elif step.client.returncode:
                step.clear()
        if seen.slow is not None and not swap:  # used on, as there is none to take its place
            self._note(replace(self._event("excluded"), node=seen.slow.node, reason=slow_words(seen.slow)))
            self._avoid(seen.slow.node, slow_words(seen.slow))
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
        """Where the job outlives its first node, a task on some others that puts it back into the queue then."""
        left = dict.fromkeys((*hosts, *self._left()))
        others = tuple(host for host in left if host != self.nodes[0])[:DEPUTIES]
        if not self.job.survives or not others or (self.deputy is not None and self.deputy.client.poll() is None):
            return
        folder = Path(self.job.folder)
        words = (str(folder), self.job.run, self.allocation.job, str(self.allocation.restart), self.nodes[0])
        command = (python_of(self.job.cluster), "-m", "framework.launch.deputy", *words)
        logs = folder / "deputy"
        self.deputy = start_step(
            replace(self.job, cluster=replace(self.job.cluster, srun=[])),  # where scontrol is: outside any container
            self.allocation.job,
            others,
            command,
            tasks_a_node=1,
            logs=logs,
            own={},
            tolerant=True,
        )

    def _left(self) -> tuple[str, ...]:
        """The nodes that are used."""
        return tuple(node for node in self.nodes if node not in self.bad)

    def _too_few(self) -> str:
        bad = "; ".join(f"{node}: {why}" for node, why in self.bad.items())
        return f"{len(self._left())} of {len(self.nodes)} nodes are left, {self.job.nodes[0]} are needed ({bad})"

    def _exclude(self, node: str, reason: str, *, remembered: bool = True) -> None:
        """Use a node no more in this start. remembered: nor, for a time, in any other; a node that the scheduler holds
        for lost it keeps away by itself.
        """
        if node not in self.bad:
            self.bad[node] = reason
            self._note(replace(self._event("excluded"), node=node, reason=reason))
            line(f"{node} isn't used any more: {reason}")
            if remembered:
                self._avoid(node, reason)

    def _avoid(self, node: str, reason: str) -> None:
        """Keep away from a node in later starts."""
        cluster = self.job.cluster
        self.avoided.add(node)
        try:
            remember(nodes_path(cluster), node, reason, time.time(), cluster.health.expiry)
        except (OSError, ValueError) as error:
            line(f"can't remember {node} as bad: {error}")

    def _remembered(self) -> list[str]:
        """The nodes that any job has found bad."""
        try:
            return excluded(nodes_path(self.job.cluster), time.time())
        except (OSError, ValueError):
            return []

    def _left_out(self) -> list[str]:
        """The nodes to keep away from in the queue; none where too few would be left of the cluster."""
        names = sorted({*self.job.exclude, *self.avoided, *self._remembered()})
        left = slurm.num_nodes(self.job.cluster.sbatch.get("partition", "")) - len(names)
        if names and left < self.job.wanted[0]:
            line(f"{', '.join(names)} are not left out, though bad: too few others are there")
            return []
        return names

    def _told_before_start(self) -> int:
        if self._is_cancelled():
            return self._finish("cancelled", "cancelled before ranks were started")
        return self._requeue(Next("requeue", "preempted", "told to end before ranks were started"))

    def _is_cancelled(self) -> bool:
        """Whether a person has said so (`cuboid cancel`), or this job was told to end and isn't to come back."""
        return self._was_asked() or (self.told.yes and self._fate() == "cancelled")

    def _was_asked(self) -> bool:
        """Whether a person has asked for the end by `cuboid cancel`."""
        return any(event.event == "cancelled" and event.job == self.allocation.job for event in self.history.events())

    def _fate(self) -> str:
        return slurm.fate(self.allocation.job, self.allocation.restart)

    def _look(self, step: Step) -> None:
        """While ranks run: what has been asked of this job that they, or it, may have missed."""
        now = time.monotonic()
        if now - self.looked < ASK:
            return
        self.looked = now
        if self.told.yes and not self.back and self._fate() == "limit":
            self._put_back()  # at once, while the ranks save: the time until this process is ended is short
        elif not self.told.yes and self._was_asked():
            step.signal("USR2")

    def _is_replaced(self) -> bool:
        """Whether this is what is left of a start whose node the scheduler holds for lost: nobody told it to end."""
        return not self.told.yes and self._fate() == "requeued"

    def _requeue(self, following: Next) -> int:
        """Back into the queue, without the bad nodes. A status other than 0 where the scheduler refuses."""
        fate = self._fate() if self.told.yes else "unknown"
        if fate == "cancelled" and not self.back:
            return self._finish("cancelled", f"cancelled by scancel; {following.reason}")
        self._note(replace(self._event("requeued"), outcome=following.outcome, reason=following.reason))
        line(f"back into the queue: {following.reason}")
        if self.back or fate == "requeued":
            return 0
        problem = self._put_back()
        return 0 if problem is None else self._finish("retry", f"{problem}; {following.reason}")

    def _put_back(self) -> str | None:
        """Tell the scheduler, again and again where it doesn't answer. Returns why that can't be done."""
        problem = None
        for seconds in (*PATIENCE, 0.0):
            try:
                slurm.requeue(self.allocation.job, self._left_out())
                self.back = True
                return None
            except OSError as error:
                problem = str(error)
                line(problem)
            time.sleep(seconds)
        return problem

    def _pause(self) -> None:
        """Wait before the next try, longer each time."""
        seconds = PATIENCE[min(self.pauses, len(PATIENCE) - 1)]
        self.pauses += 1
        line(f"waiting {seconds:g} s before that")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.told.yes:
            time.sleep(0.2)

    def _finish(self, outcome: Outcome, reason: str, *, step: int | None = None) -> int:
        """The end of the job."""
        self._note(replace(self._event("finished"), outcome=outcome, reason=reason, step=step))
        line(f"{outcome}: {reason}")
        return STATUS.get(outcome, 1)

    def _note_end(self, ended: Ended) -> None:
        attempt = latest_attempt(self.path)
        self._note(
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

    def _note(self, event: Event) -> None:
        """Put down what happens. A disk that is full is no reason to end."""
        try:
            self.history.add(event)
        except OSError as error:
            line(f"can't write {self.history.path}: {error}")

    def _event(self, name: EventName) -> Event:
        return Event(name, now(), job=self.allocation.job)


def repeats(past: Sequence[Event], suspect: str) -> bool:
    """Whether the attempt before named the same node."""
    return next((event.node for event in reversed(past) if event.event == "ended"), None) == suspect


def supervise(job: Job) -> None:
    """What the batch script runs. Ends the process with the job's exit status."""
    allocation, told = read_allocation(), Told()
    stay_alive(Path(job.folder))
    told.yes = told.yes or slurm.is_ending(allocation.job)  # told before this process could hear it
    supervisor = Supervisor(job, allocation, slurm.expand(allocation.nodes), told)
    try:
        status = supervisor.run()
    except Exception:
        status = supervisor.fail(traceback.format_exc())
    if status:
        raise SystemExit(status)
