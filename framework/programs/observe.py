"""What is looked at while training: the validation loss and samples, from the live and the averaged weights."""

from framework.data.buckets import Stream, check_held_out, streams_of
from framework.data.config import StreamConfig
from framework.data.device import Mover
from framework.diffusion.flow import Flow
from framework.diffusion.sampler import Experts
from framework.diffusion.video_file import write_contact_sheet, write_mp4
from framework.ema import Ema
from framework.evaluate.validation import Validation
from framework.log import ProgressReport
from framework.metrics import MetricsWriter
from framework.parallel.mesh import Mesh
from framework.parallel.zero.engine import Engine
from framework.programs import build
from framework.programs.generate import Generator
from framework.recipe import Recipe, sample_bucket
from framework.run import Run


class Observer:
    """Validates and samples when the recipe says so."""

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        run: Run,
        *,
        flow: Flow,
        engine: Engine,
        ema: Ema,
        encoders: build.Encoders,
        streams: list[Stream],
    ) -> None:
        """streams: that are trained on."""
        self._recipe, self._run = recipe, run
        self._engine, self._ema = engine, ema
        self._validation = build_validation(recipe, mesh, flow, encoders, streams) if recipe.validation.every else None
        bucket = sample_bucket(recipe)
        place = recipe.data.buckets.index(bucket)
        self._generator = Generator(
            recipe, encoders, bucket.clip, build.this_device(), build.bucket_meshes(recipe, mesh)[place]
        )

    def is_due(self, step: int) -> bool:
        """Whether something happens after this step."""
        return self._validates(step) or self._samples(step)

    def observe(self, step: int, metrics: MetricsWriter, report: ProgressReport) -> float | None:
        """Do what is due; the validation loss of the live weights, if that was. A collective over all ranks."""
        raw: float | None = None
        if self._validates(step):
            raw = self._validate("raw", step, metrics)
            with self._ema.in_place_of_weights(self._engine):
                averaged = self._validate("ema", step, metrics)
            report.say(f"validation after step {step}: loss {raw:.5f}, with EMA weights {averaged:.5f}")
        if self._samples(step):
            self._sample(step)
            report.say(f"samples after step {step}: {self._run.samples}/step-{step:08}-*.mp4")
        return raw

    def _validates(self, step: int) -> bool:
        every = self._recipe.validation.every
        return every > 0 and (step % every == 0 or step == self._recipe.train.steps)

    def _samples(self, step: int) -> bool:
        every = self._recipe.samples.every
        return every > 0 and (step % every == 0 or step == self._recipe.train.steps)

    def _validate(self, weights: str, step: int, metrics: MetricsWriter) -> float:
        assert self._validation is not None
        result = self._validation.run(self._engine)
        buckets = {
            bucket: {"sigma": list(sigmas), "loss": list(losses)}
            for bucket, sigmas, losses in zip(result.buckets, result.sigmas, result.by_sigma, strict=True)
        }
        metrics.write_validation({"step": step, "weights": weights, "loss": result.loss, "buckets": buckets})
        return result.loss

    def _sample(self, step: int) -> None:
        """Prompts are dealt to the replicas; every rank runs as often, since a forward may be a collective."""
        config, mesh = self._recipe.samples, self._generator.mesh
        self._run.samples.mkdir(exist_ok=True)
        for first in range(0, len(config.prompts), mesh.dp.size):
            number = first + mesh.dp.index
            prompt = config.prompts[min(number, len(config.prompts) - 1)]
            (video,) = self._generator(Experts.lone(self._engine), [prompt], seed=config.seed)
            if number < len(config.prompts) and mesh.replica.index == 0:
                stem = self._run.samples / f"step-{step:08}-{number:02}"
                write_mp4(stem.with_suffix(".mp4"), video, self._generator.fps)
                write_contact_sheet(stem.with_suffix(".png"), [(prompt, video)])


def build_validation(
    recipe: Recipe, mesh: Mesh, flow: Flow, encoders: build.Encoders, trained: list[Stream]
) -> Validation:
    """The held-out clips of the recipe. Raises ValueError when one of them is trained on."""
    streams = streams_of(recipe, [StreamConfig(path) for path in recipe.validation.shards])
    if recipe.validation.held_out:
        check_held_out(trained, streams)
    meshes = build.bucket_meshes(recipe, mesh)
    builder = build.build_builder(recipe, streams, encoders, dropout=0.0)
    return Validation(
        recipe.validation,
        streams,
        recipe.data.buckets,
        builder=builder,
        channel=build.build_channel(builder, meshes),
        mover=Mover(build.this_device()),
        flow=flow,
        meshes=meshes,
        micro_batch=recipe.data.micro_batch,
        seed=recipe.seed,
        patch_size=recipe.model.patch_size,
        pattern=recipe.attention.pattern,
    )
