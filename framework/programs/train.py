"""`cuboid train`, on one rank: the loop."""

import gc
import signal
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from framework.batch import Batch, Noised, Tokens
from framework.checkpoint.find import store_of
from framework.checkpoint.local import local_directory
from framework.checkpoint.manifest import Origin, Progress
from framework.checkpoint.resume import Resumed, resume
from framework.checkpoint.save import Saver
from framework.checkpoint.writer import Subject
from framework.data.buckets import Stream, streams_of
from framework.data.loader import Loader
from framework.data.schedule import Schedule, Work
from framework.ema import Ema
from framework.environment import Environment, StopFlag
from framework.heartbeat import Heart, process_began
from framework.log import ProgressReport
from framework.metrics import MetricsWriter, StepRecord, open_metrics
from framework.models.patchify import patchify
from framework.optim import learning_rate
from framework.parallel.collectives import all_reduce_sum, barrier, gather_objects
from framework.parallel.context_parallel.tokens import split_tokens
from framework.parallel.fragments import ParameterShard
from framework.parallel.mesh import Mesh
from framework.parallel.zero.engine import Engine, StepStats
from framework.plan.parameters import elements_of, parameter_shapes
from framework.plan.zero_traffic import engine_traffic
from framework.programs import build
from framework.programs.observe import Observer
from framework.programs.watch import Watch, agreed_signal
from framework.recipe import Recipe, bucket_tokens, resolve_auto
from framework.run import Resolved, Run, RunFailure, Verdict, recipe_hash, versions
from framework.shapes import LatentShape
from framework.stacks import dump_on_signal


class Objective(Protocol):
    """What the loop needs of the objective (diffusion/flow.py)."""

    def noise(self, batch: Batch, *, step: int) -> Noised: ...

    def loss_sum(self, prediction_bsq: Tensor, tokens: Tokens, /) -> Tensor: ...

    def global_count(self, counts: Sequence[float], latents: Sequence[LatentShape], channels: int, /) -> float: ...


@dataclass(frozen=True)
class Parts:
    """What the loop works with. meshes: as each bucket sees the mesh. expected: samples of each bucket in a step, on
    average.
    """

    recipe: Recipe
    mesh: Mesh
    meshes: list[Mesh]
    engine: Engine
    ema: Ema
    flow: Objective
    schedule: Schedule
    loader: Loader
    latents: list[LatentShape]
    num_tokens: list[int]
    expected: tuple[float, ...]

    def global_count(self, work: Work) -> float:
        """What the gradient of the step's sum of losses is divided by: a pure function of the schedule."""
        return self._count(work.counts if self.recipe.loss.weight == "per_step" else self.expected)

    def own_count(self, work: Work) -> float:
        """What the step's sum of losses is divided by to be a mean."""
        return self._count(work.counts)

    def _count(self, counts: Sequence[float]) -> float:
        model = self.recipe.model
        return self.flow.global_count(counts, self.latents, model.out_channels or model.in_channels)


def train(invocation: Resolved, env: Environment, heart: Heart | None = None, stop: StopFlag | None = None) -> Verdict:
    """Train until train.steps, or until a signal asks to stop. heart, stop: of the process, where it has them."""
    stop = stop or StopFlag()
    heart = heart or Heart(begin=process_began(), writes=env.is_first)
    heart.enter("init")
    recipe = build.settle(invocation.recipe, env)
    mesh = build.open_mesh(recipe, env)
    storage = store_of(recipe)
    resolved, claimed = resolve_auto(invocation.recipe), env.attempt
    run, fence = build.open_run(resolved, invocation.overrides, mesh, storage, claimed=claimed)
    heart.attach(run)
    dump_on_signal(run, mesh.rank)
    heart.enter("build")
    model, shards = build.build_model(recipe, mesh)
    engine = build.build_engine(recipe, model, shards, mesh)
    ema = Ema(engine.fragments(), recipe.ema)
    fragments = [*engine.fragments(), *ema.fragments()]
    heart.enter("load")
    near = local_directory(recipe.checkpoint.local, storage) if recipe.checkpoint.local else None
    resumed = resume(storage, fragments, mesh.control, fall_back=recipe.resume.fall_back, near=near)
    notes = list(invocation.notes)
    if resumed is None:
        build.initialise(fragments, recipe)
        notes += build.take_weights(fragments, recipe, shards, mesh.control)
        ema.restart()
    else:
        notes += resumed.notes
    progress = Progress() if resumed is None else resumed.found.manifest.progress
    heart.resumed(progress.step, last=recipe.train.steps)
    if progress.step >= recipe.train.steps:
        notes.append(f"the run {recipe.run} is finished: {progress.step} of {recipe.train.steps} steps are done")
    engine.refresh(updates=progress.updates)
    build.begin(fence, progress.step, mesh.control)
    streams = streams_of(recipe)
    identity = build.agree_on_data(recipe, streams, mesh.control)
    if resumed is not None:
        build.check_same_data(recipe, resumed.found.manifest.origin.data, identity)
    subject = build_subject(recipe, mesh, shards, run, resumed, data=identity)
    saver = Saver(storage, recipe.checkpoint, mesh, fence=fence, subject=subject, fragments=fragments)
    encoders = build.Encoders(recipe, build.this_device())
    parts = build_parts(recipe, mesh, engine, streams=streams, ema=ema, encoders=encoders, start=progress.step)
    build.describe_data(recipe, streams, mesh, run)
    flow = build.build_flow(recipe)
    observer = Observer(recipe, mesh, run, flow=flow, engine=engine, ema=ema, encoders=encoders, streams=streams)
    report = ProgressReport(first=progress.step, last=recipe.train.steps, every=recipe.log.every, silent=mesh.rank != 0)
    for text in (*notes, *start_lines(parts, progress, run)):
        report.say(text)
    metrics = open_metrics(recipe, run, start=progress.step, writes=mesh.rank == 0)
    watch = Watch(heart, recipe.watch, mesh, saver, build.this_device())
    heart.enter("first_step")
    try:
        progress, stopped = loop(
            parts, progress, saver, observer=observer, metrics=metrics, report=report, stop=stop, watch=watch
        )
    except ValueError as error:
        # The user's mistakes are found before the loop; what is raised inside needs its traceback.
        raise RuntimeError(f"the run {run.path} failed: {error}") from error
    finally:
        gc.enable()
        saver.close(recipe.watch.save)
        parts.loader.close()
        report.close()
        metrics.close()
    verdict = Verdict("stopped" if stopped else "done", progress.step, stopped)
    if mesh.rank == 0:
        run.write_verdict(verdict)
    barrier(mesh.control)
    return verdict


def loop(
    parts: Parts,
    progress: Progress,
    saver: Saver,
    *,
    observer: Observer,
    metrics: MetricsWriter,
    report: ProgressReport,
    stop: StopFlag,
    watch: Watch,
) -> tuple[Progress, int | None]:
    """The steps. Returns where it ended and the signal that ended it, if one did."""
    recipe, last = parts.recipe, parts.recipe.train.steps
    pending: StepRecord | None = None
    stopped = agreed_signal(stop, parts.mesh) if progress.step < last else None  # at once: there is nothing to save
    gc.disable()
    while progress.step < last and stopped is None:
        # Whether anybody was asked to stop, or can't save, is agreed on while the step runs, so before the next one;
        # with it, how many samples of the steps before couldn't be had.
        asked = torch.tensor([stop.signal or 0, saver.failed, parts.loader.lost])
        agreement = all_reduce_sum(asked, parts.mesh.control, "stop")
        begin, waited = time.perf_counter(), parts.loader.waited
        work = parts.loader.next_work()
        assert work.step == progress.step
        loss_sum, stats, suspects = optimizer_step(parts, work)
        progress = advance(progress, work, parts.num_tokens, stats)
        reduction = all_reduce_sum(loss_sum, parts.mesh.world, "loss")
        agreement.wait()
        signalled, failed, lost = asked.tolist()
        if pending is not None:
            publish(metrics, report, pending)
        pending = StepRecord(
            step=progress.step,
            loss_sum=loss_sum,
            work=reduction,
            count=parts.own_count(work),
            grad_norm=stats.grad_norm,
            lr=learning_rate(recipe.optimizer, step=work.step),
            tokens=step_tokens(work, parts.num_tokens),
            samples=work.num_samples,
            seconds=time.perf_counter() - begin,
            data_wait=parts.loader.waited - waited,
            skipped=stats.skipped,
            traffic=traffic(parts.mesh),
            uids=suspects,
            lost=lost,
        )
        watch.stepped(pending, loss=metrics.loss)
        for text in saver.report():
            report.say(text)
        if failed:
            saver.wait()
            raise RunFailure("another rank couldn't save")
        stopped = (stop.signal or signal.SIGTERM) if signalled and progress.step < last else None
        saves = progress.step % recipe.checkpoint.every == 0 or progress.step == last or stopped is not None
        fails = progress.bad_steps >= recipe.train.max_bad_steps
        if saves or fails or observer.is_due(progress.step):
            publish(metrics, report, pending)
            pending = None
        if fails:
            raise RunFailure(f"up to step {progress.step}, {progress.bad_steps} updates in a row had no finite norm")
        if observer.is_due(progress.step):
            with watch.during("observe"):
                observer.observe(progress.step, metrics, report)
        if saves:
            with watch.during("save"):
                saver.save(progress)
        if progress.step % recipe.train.collect_garbage_every == 0:
            gc.collect()
    watch.end()
    saver.wait()
    watch.end()
    for text in saver.report():
        report.say(text)
    return progress, stopped


def build_subject(
    recipe: Recipe, mesh: Mesh, shards: list[ParameterShard], run: Run, resumed: Resumed | None, *, data: str
) -> Subject:
    """What the checkpoints of this attempt say of themselves."""
    parents = (recipe.init_from,) if recipe.init_from else ()
    origin = Origin(
        attempt=run.attempt,
        mesh=asdict(mesh.shape),
        engine=recipe.zero.engine,
        zero_stage=recipe.zero.stage,
        precision=recipe.precision.parameters,
        recipe=recipe_hash(recipe),
        data=data,
        versions=versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        parents=parents if resumed is None else (resumed.found.entry.folder,),
    )
    configs = {"model": asdict(recipe.model), "lora": asdict(recipe.lora)}
    return Subject(origin, configs, shards, known=None if resumed is None else resumed.frozen)


def optimizer_step(parts: Parts, work: Work) -> tuple[Tensor, StepStats, tuple[str, ...]]:
    """One step over its micro-batches: this rank's loss sum, the statistics, and of a skipped update the samples that
    may have caused it.
    """
    losses = accumulate(parts, work)
    stats = parts.engine.step(lr=learning_rate(parts.recipe.optimizer, step=work.step))
    loss_sum = torch.stack([loss for loss, _ in losses]).sum()
    if stats.skipped:
        return loss_sum, stats, suspects_of(losses, parts.mesh)
    parts.ema.update(step=work.step)
    return loss_sum, stats, ()


def accumulate(parts: Parts, work: Work) -> list[tuple[Tensor, tuple[str, ...]]]:
    """Forward and backward of a step's micro-batches: each one's loss sum, as far as it is this rank's, and samples."""
    losses = []
    for index, batch in enumerate(parts.loader.batches(work)):
        noised = parts.flow.noise(batch, step=work.step)
        tokens = split_tokens(patchify(noised, parts.recipe.model.patch_size), parts.meshes[batch.bucket])
        loss = parts.flow.loss_sum(parts.engine(tokens, batch.condition), tokens)
        parts.engine.backward(loss, global_count=parts.global_count(work), last=index + 1 == work.num_micro)
        losses.append((loss.detach(), batch.uids))
    return losses


def suspects_of(losses: list[tuple[Tensor, tuple[str, ...]]], mesh: Mesh) -> tuple[str, ...]:
    """The samples of all ranks whose loss isn't finite; every sample of the step where all losses are. A collective:
    the gradient's norm is global, so all ranks skip together.
    """
    here = [(bool(torch.isfinite(loss)), [uid for uid in uids if uid]) for loss, uids in losses]
    everywhere = [item for rank in gather_objects(here, mesh.control) for item in rank]
    bad = [uid for finite, uids in everywhere if not finite for uid in uids]
    return tuple(sorted(bad or [uid for _, uids in everywhere for uid in uids]))


def build_parts(
    recipe: Recipe,
    mesh: Mesh,
    engine: Engine,
    *,
    streams: list[Stream],
    ema: Ema,
    encoders: build.Encoders,
    start: int,
) -> Parts:
    """Data, objective and order for the loop."""
    meshes = build.bucket_meshes(recipe, mesh)
    schedule = build.build_schedule(recipe, streams, meshes)
    reads = any(each.replica.index == 0 for each in meshes)
    workers = recipe.data.workers if reads else 0
    builder = build.build_builder(recipe, streams, encoders, dropout=recipe.text.dropout, workers=workers)
    return Parts(
        recipe=recipe,
        mesh=mesh,
        meshes=meshes,
        engine=engine,
        ema=ema,
        flow=build.build_flow(recipe),
        schedule=schedule,
        loader=build.build_loader(recipe, streams, builder, schedule, meshes=meshes, start=start),
        latents=[builder.latent_shape(index) for index in range(len(recipe.data.buckets))],
        num_tokens=[bucket_tokens(recipe, index).num_tokens for index in range(len(recipe.data.buckets))],
        expected=schedule.batches.expected(recipe.data.rounds),
    )


def advance(progress: Progress, work: Work, num_tokens: list[int], stats: StepStats) -> Progress:
    """The progress after a step."""
    return replace(
        progress,
        step=progress.step + 1,
        updates=progress.updates + (not stats.skipped),
        samples=progress.samples + work.num_samples,
        tokens=progress.tokens + step_tokens(work, num_tokens),
        bad_steps=progress.bad_steps + 1 if stats.skipped else 0,
    )


def step_tokens(work: Work, num_tokens: list[int]) -> int:
    """Tokens of a step over all ranks; empty slots don't count."""
    return sum(count * tokens for count, tokens in zip(work.counts, num_tokens, strict=True))


def traffic(mesh: Mesh) -> dict[str, int]:
    """Bytes that our own collectives have sent so far, by group."""
    groups = [group for each in (mesh, *mesh.splits.values()) for group in each.groups()]
    totals: defaultdict[str, Fraction] = defaultdict(Fraction)
    for group in {id(group): group for group in groups if group.size > 1}.values():
        totals[group.name] += sum(group.traffic.num_bytes.values())
    return {name: round(total) for name, total in totals.items()}


def publish(metrics: MetricsWriter, report: ProgressReport, record: StepRecord) -> None:
    """Write and show a step."""
    line = metrics.write(record)
    report.step(
        record.step,
        loss=float(str(line["loss"])),
        grad_norm=record.grad_norm,
        tokens_per_second=record.tokens / record.seconds,
    )
    if record.skipped:
        report.say(f"step {record.step}: gradient norm not finite, update skipped; samples {', '.join(record.uids)}")


def start_lines(parts: Parts, progress: Progress, run: Run) -> list[str]:
    """What a start prints."""
    recipe, shape = parts.recipe, parts.mesh.shape
    sizes = parts.schedule.batches.sizes
    buckets = ", ".join(
        f"{size} x {bucket.name} = {size * tokens} tokens"
        for bucket, tokens, size in zip(recipe.data.buckets, parts.num_tokens, sizes, strict=True)
    )
    num_micro = parts.schedule[progress.step].num_micro
    zero = engine_traffic(recipe, shape, parts.mesh.rank, num_micro)
    where = f"resumes after step {progress.step}" if progress.step else "starts"
    parameters = parameter_shapes(recipe.model, lora=recipe.lora, trainable=recipe.train.trainable)
    total, trained = elements_of(parameters), elements_of([p for p in parameters if p.trained])
    partial = [f"trains {trained:,} of {total:,} parameters ({trained / total:.2%})"] if trained < total else []
    return [
        f"run {run.path} {where} (attempt {run.attempt})",
        *partial,
        f"mesh {shape} = {shape.world_size} ranks, ZeRO stage {recipe.zero.stage} ({recipe.zero.engine}), "
        f"{recipe.precision.parameters}",
        f"buckets: {buckets}; {parts.schedule.waste():.1%} of slots empty",
        f"ZeRO sends {float(zero.total) / 1e6:,.1f} MB a rank and step, {zero.ratio:.3f} of its stage's least",
    ]
