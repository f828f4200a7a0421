"""What a step sends on a mesh, counted while it runs: on this job's ranks, or by one process in a mesh of thousands
that aren't there (parallel/fake.py).
"""

from dataclasses import dataclass
from fractions import Fraction

from framework.data.buckets import streams_of
from framework.data.splits import resolve_degrees
from framework.ema import Ema
from framework.environment import be_first_rank
from framework.parallel.config import MeshShape
from framework.parallel.fake import fake_mesh
from framework.parallel.mesh import Mesh
from framework.parallel.zero.meter import CollectiveMeter, own_traffic
from framework.plan.traffic import Ledger, MicroShape
from framework.programs import build
from framework.programs.parts import build_parts
from framework.programs.train import optimizer_step
from framework.recipe import Recipe, bucket_timesteps, resolve_auto

WARMUP = 3  # steps until every engine is in its stride


@dataclass(frozen=True)
class Counted:
    """One step of this rank. own: of our collectives, by group and purpose. engine: bytes of the engine's."""

    micros: tuple[MicroShape, ...]
    own: Ledger
    engine: Fraction
    skipped: bool


def count_step(recipe: Recipe, mesh: Mesh) -> Counted:
    """The fourth step of a recipe. A collective."""
    model, shards = build.build_model(recipe, mesh)
    engine = build.build_engine(recipe, model, shards, mesh)
    build.initialise(engine.fragments(), recipe)
    engine.refresh(updates=0)
    encoders = build.Encoders(recipe)
    parts = build_parts(
        recipe,
        mesh,
        engine,
        streams=streams_of(recipe),
        ema=Ema(engine.fragments(), recipe.ema),
        encoders=encoders,
    )
    for _ in range(WARMUP):
        optimizer_step(parts, parts.loader.next_work())
    before, work = own_traffic(mesh), parts.loader.next_work()
    with CollectiveMeter() as meter:
        _, stats, _ = optimizer_step(parts, work)
    own = {
        key: (calls - before.get(key, (0, 0))[0], sent - before.get(key, (0, Fraction()))[1])
        for key, (calls, sent) in own_traffic(mesh).items()
    }
    parts.loader.close()
    engine.destroy()
    text = encoders.text.encode([""])[0].shape[1]
    return Counted(
        micros=tuple(
            MicroShape(micro.bucket, len(micro.slots), text, timesteps=bucket_timesteps(recipe, micro.bucket))
            for micro in work.micro_batches
        ),
        own=own,
        engine=meter.total - sum(sent for _, sent in own.values()),
        skipped=stats.skipped,
    )


def count_fake_step(recipe: Recipe, shape: MeshShape) -> Counted:
    """The same on the first rank of a mesh that isn't there, in a process that has joined no process group."""
    be_first_rank()
    recipe = resolve_degrees(resolve_auto(recipe), shape)
    with fake_mesh(shape, build.bucket_splits(recipe)) as mesh:
        return count_step(recipe, mesh)
