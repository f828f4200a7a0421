"""`cuboid train`, on one rank: the loop."""

import gc
import math
import signal
import time
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from framework.checkpoint.find import store_of
from framework.checkpoint.manifest import Progress
from framework.checkpoint.save import Saver
from framework.data.buckets import streams_of
from framework.data.budget import with_steps
from framework.data.schedule import Work
from framework.ema import Ema
from framework.environment import Environment, StopFlag
from framework.heartbeat import Heart, process_began
from framework.log import ProgressReport, line
from framework.metrics import MetricsWriter, StepRecord, open_metrics
from framework.models.patchify import patchify
from framework.optim import learning_rate
from framework.parallel.collectives import all_reduce_sum, barrier
from framework.parallel.context_parallel.tokens import split_tokens
from framework.parallel.mesh import Mesh, close_mesh, set_patience
from framework.parallel.zero.engine import StepStats
from framework.plan.parameters import elements_of, parameter_shapes
from framework.plan.zero_traffic import engine_traffic
from framework.programs import build
from framework.programs.guard import Ended, ReplicaCheck, check_rollbacks, norm_limit, suspects_of, with_norm
from framework.programs.observe import Observer
from framework.programs.opening import Opened, build_subject, load
from framework.programs.parts import Parts, build_parts
from framework.programs.stage import StageEnd
from framework.programs.watch import Watch, agreed_signal
from framework.run import Resolved, Run, RunFailure, Verdict
from framework.stacks import dump_on_signal
from framework.stages.merge import Stage
from framework.stages.recipes import recipe_at, resolve_run, stages_of


def train(
    invocation: Resolved,
    env: Environment,
    heart: Heart | None = None,
    stop: StopFlag | None = None,
    *,
    stage: int | None = None,
) -> Verdict:
    """Train until train.steps, or to the end of a stage, or until a signal asks to stop. heart, stop: of the process,
    where it has them. stage: of a recipe with stages, the one that goes on.
    """
    stop = stop or StopFlag()
    heart = heart or Heart(begin=process_began(), writes=env.is_first)
    heart.enter("init")
    resolved = resolve_run(invocation.recipe, stage, with_steps)
    stages = stages_of(resolved)
    recipe = build.settle(recipe_at(resolved, stage), env)
    mesh = build.open_mesh(recipe, env)
    storage = store_of(recipe)
    run, fence = build.open_run(resolved, invocation.overrides, mesh, storage, claimed=env.attempt, stage=stage)
    heart.attach(run)
    dump_on_signal(run, mesh.rank)
    heart.enter("build")
    model, shards = build.build_model(recipe, mesh)
    engine = build.build_engine(recipe, model, shards, mesh)
    ema = Ema(engine.fragments(), recipe.ema)
    streams = streams_of(recipe)
    opened = Opened(
        recipe=recipe,
        mesh=mesh,
        storage=storage,
        run=run,
        fence=fence,
        shards=shards,
        engine=engine,
        ema=ema,
        fragments=[*engine.fragments(), *ema.fragments()],
        streams=streams,
        encoders=build.Encoders(recipe, build.this_device()),
        data=build.agree_on_data(recipe, streams, mesh.control),
        notes=invocation.notes,
        stage=None if stage is None else stages[stage],
    )
    build.describe_data(recipe, streams, mesh, run)
    ended = go_on(opened, None, heart=heart, stop=stop)
    while ended.bad:
        check_rollbacks(ended, recipe.guard, recipe.train)
        ended = go_on(opened, ended, heart=heart, stop=stop)
    progress, stopped = ended.progress, ended.signal
    verdict = Verdict("stopped" if stopped else "done", progress.step, stopped)
    if opened.stage is not None:
        verdict = replace(verdict, stage=opened.stage.name, follow=0 if stopped else len(stages) - progress.stage)
    if mesh.rank == 0:
        run.write_verdict(verdict)
    barrier(mesh.control)
    if verdict.follow and stopped is None:  # the next one may follow in this process
        engine.destroy()
        close_mesh(mesh)
    return verdict


def go_on(opened: Opened, before: Ended | None, *, heart: Heart, stop: StopFlag) -> Ended:
    """Train on from the newest checkpoint, or from the initial weights. before: how the steps ended that are gone back
    from.
    """
    recipe, mesh, run, stage = opened.recipe, opened.mesh, opened.run, opened.stage
    heart.enter("load")
    set_patience(recipe.watch.start)
    loaded = load(opened, before)
    progress = loaded.progress
    if stage is not None and progress.stage > stage.index:
        for text in loaded.notes if mesh.rank == 0 else ():
            line(text)
        return Ended(progress, None, progress.step)
    subject = build_subject(opened, loaded.resumed)
    saver = Saver(
        opened.storage, recipe.checkpoint, mesh, fence=opened.fence, subject=subject, fragments=opened.fragments
    )
    engine, ema, encoders, streams = opened.engine, opened.ema, opened.encoders, opened.streams
    parts = build_parts(
        recipe,
        mesh,
        engine,
        streams=streams,
        ema=ema,
        encoders=encoders,
        progress=progress,
        stage=stage,
    )
    recipe = parts.recipe
    heart.resumed(progress.step, last=recipe.train.steps, stage="" if stage is None else stage.name)
    flow = build.build_flow(recipe)
    observer = Observer(recipe, mesh, run, flow=flow, engine=engine, ema=ema, encoders=encoders, streams=streams)
    replicas = ReplicaCheck(engine.fragments(), mesh, every=recipe.guard.hash_every)
    report = ProgressReport(first=progress.step, last=recipe.train.steps, every=recipe.log.every, silent=mesh.rank != 0)
    for text in (*loaded.notes, *(start_lines(parts, progress, run, stage) if before is None else ())):
        report.say(text)
    metrics = open_metrics(recipe, run, start=progress.step, writes=mesh.rank == 0, stage=stage)
    watch = Watch(heart, recipe.watch, mesh, saver, build.this_device())
    heart.enter("first_step")
    try:
        return loop(
            parts,
            progress,
            saver,
            end=StageEnd(stage, mesh.control),
            observer=observer,
            replicas=replicas,
            metrics=metrics,
            report=report,
            stop=stop,
            watch=watch,
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


def loop(
    parts: Parts,
    progress: Progress,
    saver: Saver,
    *,
    end: StageEnd,
    observer: Observer,
    replicas: ReplicaCheck,
    metrics: MetricsWriter,
    report: ProgressReport,
    stop: StopFlag,
    watch: Watch,
) -> Ended:
    """The steps."""
    recipe, last, saved = parts.recipe, parts.recipe.train.steps, progress.step
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
        assert work.step == progress.data_step
        limit = norm_limit(recipe.guard, progress.norms)
        loss_sum, stats, suspects = optimizer_step(parts, work, step=progress.step, limit=limit)
        progress = advance(progress, work, parts, stats)
        agreement.wait()
        signalled, failed, lost = asked.tolist()
        if pending is not None:
            publish(metrics, report, pending)
        pending = record_of(
            parts,
            progress.step,
            work,
            stats,
            loss_sum=loss_sum,
            seconds=time.perf_counter() - begin,
            data_wait=parts.loader.waited - waited,
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
        # One that falls due among bad updates waits for a good one: nothing is new before.
        due = progress.step // recipe.checkpoint.every > saved // recipe.checkpoint.every and not progress.bad_steps
        saves = due or progress.step == last or stopped is not None
        fails = progress.bad_steps >= recipe.train.max_bad_steps
        if saves or fails or observer.is_due(progress.step) or replicas.is_due(progress.step):
            publish(metrics, report, pending)
            pending = None
        replicas.check(progress.step)
        if fails:
            with watch.during("save"):
                saver.wait()
            return Ended(progress, None, saved, bad=True)
        if observer.is_due(progress.step):
            with watch.during("observe"):
                progress = end.validated(progress, observer.observe(progress.step, metrics, report))
        if end.is_reached(progress, last):
            last, stopped, progress = progress.step, None, end.hand_over(progress)
        if saves or progress.step == last:
            with watch.during("save"):
                saver.save(progress)
            saved = progress.step
        if progress.step % recipe.train.collect_garbage_every == 0:
            gc.collect()
    watch.end()
    saver.wait()
    watch.end()
    for text in saver.report():
        report.say(text)
    return Ended(progress, stopped, saved)


def optimizer_step(
    parts: Parts, work: Work, *, step: int | None = None, limit: float = math.inf
) -> tuple[Tensor, StepStats, tuple[str, ...]]:
    """One step over its micro-batches: this rank's loss sum, the statistics, and of a skipped update the samples that
    may have caused it. step: the training step, where it isn't the data's. limit: the largest norm of an update.
    """
    step = work.step if step is None else step
    losses = accumulate(parts, work)
    stats = parts.engine.step(lr=learning_rate(parts.recipe.optimizer, step=step - parts.began), limit=limit)
    loss_sum = torch.stack([loss for loss, _ in losses]).sum()
    if stats.skipped:
        return loss_sum, stats, suspects_of(losses, parts.mesh)
    parts.ema.update(step=step)
    return loss_sum, stats, ()


def accumulate(parts: Parts, work: Work) -> list[tuple[Tensor, tuple[str, ...]]]:
    """Forward and backward of a step's micro-batches: each one's loss sum, as far as it is this rank's, and samples."""
    losses = []
    for index, batch in enumerate(parts.loader.batches(work)):
        noised = parts.flow.noise(batch, step=work.step)
        patches = patchify(noised, parts.recipe.model.patch_size)
        tokens = split_tokens(patches, parts.meshes[batch.bucket], parts.recipe.attention.pattern)
        loss = parts.engine.scored(tokens, batch.condition, parts.flow.score(tokens)).sum()
        parts.engine.backward(loss, global_count=parts.global_count(work), last=index + 1 == work.num_micro)
        losses.append((loss.detach(), batch.uids))
    return losses


def record_of(
    parts: Parts,
    step: int,
    work: Work,
    stats: StepStats,
    *,
    loss_sum: Tensor,
    seconds: float,
    data_wait: float,
    uids: tuple[str, ...],
    lost: int,
) -> StepRecord:
    """What is written of a step. step: steps done with it. loss_sum: of this rank; the sum over all is begun here."""
    return StepRecord(
        step=step,
        loss_sum=loss_sum,
        work=all_reduce_sum(loss_sum, parts.mesh.world, "loss"),
        count=parts.own_count(work),
        grad_norm=stats.grad_norm,
        lr=learning_rate(parts.recipe.optimizer, step=step - 1 - parts.began),
        tokens=step_tokens(work, parts.num_tokens),
        samples=work.num_samples,
        seconds=seconds,
        data_wait=data_wait,
        skipped=stats.skipped,
        traffic=traffic(parts.mesh),
        uids=uids,
        lost=lost,
        data=None if work.step == step - 1 else work.step,
    )


def advance(progress: Progress, work: Work, parts: Parts, stats: StepStats) -> Progress:
    """The progress after a step."""
    return replace(
        progress,
        step=progress.step + 1,
        updates=progress.updates + (not stats.skipped),
        samples=progress.samples + work.num_samples,
        tokens=progress.tokens + step_tokens(work, parts.num_tokens),
        bad_steps=progress.bad_steps + 1 if stats.skipped else 0,
        norms=with_norm(parts.recipe.guard, progress.norms, stats),
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
        why = "not finite" if record.why == "not finite" else f"{record.grad_norm:.4g} is a spike"
        report.say(f"step {record.step}: gradient norm {why}, update skipped; samples {', '.join(record.uids)}")


def start_lines(parts: Parts, progress: Progress, run: Run, stage: Stage | None) -> list[str]:
    """What a start prints."""
    recipe, shape = parts.recipe, parts.mesh.shape
    sizes = parts.schedule.batches.sizes
    buckets = ", ".join(
        f"{size} x {bucket.name} = {size * tokens} tokens"
        for bucket, tokens, size in zip(recipe.data.buckets, parts.num_tokens, sizes, strict=True)
    )
    num_micro = parts.schedule[progress.data_step].num_micro
    zero = engine_traffic(recipe, shape, parts.mesh.rank, num_micro)
    where = f"resumes after step {progress.step}" if progress.step else "starts"
    where += "" if stage is None else f", {stage}: {stage.exit}"
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
