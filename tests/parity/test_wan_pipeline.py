"""The whole of sampling against diffusers' pipelines: text, image, autoencoder, transformers, guidance and levels.

Tiny random weights, saved by the pipeline and read from its directory by our code; the same noise. Latents and pixels
within 1e-4 in float32.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image
from tiny_wan import build_pipeline
from torch import Tensor

from framework.diffusion.first_frame import FirstFrame
from framework.diffusion.sampler import Experts
from framework.programs.generate import Generator
from framework.programs.pipeline import Pipeline, build_generator, first_frame, load_experts, open_pipeline
from framework.shapes import ClipShape

CLIP, FOLDED = ClipShape(9, 16, 32), ClipShape(5, 32, 64)
PROMPTS = ["  a rabbit  &amp; a fox\n", "snow"]
NEGATIVE = "blurred"
ROOT = Path(__file__).parents[2]
SEED, STEPS, GUIDANCE = 11, 4, 3.5


@pytest.fixture(autouse=True)
def no_ftfy_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' image pipeline calls ftfy without asking whether it is there; it changes nothing in these prompts."""
    monkeypatch.setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=lambda text: text), raising=False)


def picture(path: Path) -> Path:
    """Larger than the clip and of another shape, so that it's resized."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((70, 64), Image.Resampling.BICUBIC).save(path)
    return path


def reference(kind: str, noise: Tensor, clip: ClipShape, **given: object) -> tuple[Tensor, Tensor]:
    """diffusers' latents `B c t h w`, and pixels in [0, 1], `B t c h w`."""
    pipeline = build_pipeline(kind)
    pipeline.set_progress_bar_config(disable=True)
    seen: list[Tensor] = []

    def keep(_: object, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return tensors

    (pixels,) = pipeline(
        prompt=PROMPTS,
        negative_prompt=[NEGATIVE] * len(PROMPTS),
        height=clip.height,
        width=clip.width,
        num_frames=clip.frames,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=noise,
        output_type="pt",
        return_dict=False,
        callback_on_step_end=keep,
        **given,
    )
    assert len(seen) == STEPS
    return seen[-1], pixels


def opened(kind: str, folder: Path, clip: ClipShape = CLIP) -> tuple[Pipeline, Generator]:
    build_pipeline(kind).save_pretrained(folder)
    pipeline = open_pipeline(folder)
    sampler = pipeline.sampler(steps=STEPS, guidance=GUIDANCE, negative=NEGATIVE)
    return pipeline, build_generator(pipeline, clip, sampler)


def assert_same(generator: Generator, experts: Experts, first: FirstFrame | None, expected: tuple[Tensor, ...]) -> None:
    latents = generator.latents(experts, PROMPTS, seed=SEED, first=first)
    torch.testing.assert_close(latents, expected[0], atol=1e-4, rtol=0)
    pixels = generator.encoders.tokenizer.decode(latents).transpose(1, 2)
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), expected[1], atol=1e-4, rtol=0)
    assert not torch.allclose(expected[0][0], expected[0][1], atol=0.1) and expected[1].std() > 0.01
    print(
        f"latents {(latents - expected[0]).abs().max():.1e}, pixels {(pixels / 2 + 0.5 - expected[1]).abs().max():.1e}"
    )


@pytest.mark.parametrize("kind", ["text", "text_folded"])
def test_text_to_video(kind: str, tmp_path: Path) -> None:
    clip = FOLDED if kind == "text_folded" else CLIP
    pipeline, generator = opened(kind, tmp_path, clip)
    noise = generator.noise(PROMPTS, seed=SEED)
    experts = load_experts(pipeline, generator.recipe, generator.device, low_guidance=None)
    assert_same(generator, experts, None, reference(kind, noise, clip))
    with pytest.raises(ValueError, match="leave out the low guidance"):
        load_experts(pipeline, generator.recipe, generator.device, low_guidance=2.0)


@pytest.mark.parametrize("low_guidance", [None, 1.5])
def test_two_experts(low_guidance: float | None, tmp_path: Path) -> None:
    pipeline, generator = opened("experts", tmp_path)
    noise = generator.noise(PROMPTS, seed=SEED)
    experts = load_experts(pipeline, generator.recipe, generator.device, low_guidance=low_guidance)
    assert_same(generator, experts, None, reference("experts", noise, CLIP, guidance_scale_2=low_guidance))


@pytest.mark.parametrize("kind", ["image", "image_experts"])
def test_image_to_video(kind: str, tmp_path: Path) -> None:
    pipeline, generator = opened(kind, tmp_path)
    file = picture(tmp_path / "first.png")
    with Image.open(file) as image:
        expected = reference(kind, generator.noise(PROMPTS, seed=SEED), CLIP, image=image.convert("RGB"))
    first = first_frame(pipeline, generator, file)
    assert (first.tokens is None) == (kind == "image_experts")
    experts = load_experts(pipeline, generator.recipe, generator.device, low_guidance=None)
    assert_same(generator, experts, first, expected)
    with pytest.raises(ValueError, match="it makes videos of an image, give one"):
        generator(experts, PROMPTS, seed=SEED)


def test_the_command_samples_a_pipelines_directory(tmp_path: Path) -> None:
    """Through the command, whose mp4 holds the frames of the generator; mistakes are one message."""
    pipeline, _ = opened("image", tmp_path / "model")
    file, out = picture(tmp_path / "first.png"), tmp_path / "out" / "x.mp4"
    words = ["sample", str(pipeline.path), "--prompt", "snow", "--out", str(out), "--size", "5x16x32", "--steps", "1"]

    def cuboid(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "framework.cli", *words, *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=250)

    answer = cuboid("--image", str(file))
    assert answer.returncode == 0, answer.stderr
    assert f"5x16x32 from {pipeline.path}" in answer.stdout and out.is_file() and out.with_suffix(".png").is_file()
    refused = cuboid()
    assert refused.returncode == 2 and "it makes videos of an image, give one" in refused.stderr, refused.stderr


def test_a_pipeline_says_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no directory of a diffusers pipeline: model_index\.json can't be read"):
        open_pipeline(tmp_path)
    pipeline = Pipeline(tmp_path, {}, {"_class_name": "DDIMScheduler"})
    with pytest.raises(ValueError, match=r"DDIMScheduler, isn't of flow matching"):
        pipeline.sampler(steps=1, guidance=1.0, negative="")
    euler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_karras_sigmas": True}
    with pytest.raises(ValueError, match="sets use_karras_sigmas"):
        Pipeline(tmp_path, {}, euler).sampler(steps=1, guidance=1.0, negative="")
    unipc = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 5.0}
    pipeline = Pipeline(tmp_path, {}, unipc)
    assert "instead of its UniPCMultistepScheduler" in pipeline.note
    sampler = pipeline.sampler(steps=1, guidance=1.0, negative="")
    assert (sampler.shift, sampler.levels) == (5.0, "even")
