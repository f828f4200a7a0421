"""The proof that training, EMA, validation and sampling fit together: recipes/overfit.yaml gives its clip back.

The sample is compared with the tokenizer's own reconstruction of the clip, so that only the transformer is judged: at
least 20 dB, and 2 dB more than the best still picture, for which the clip's mean frame is taken too.
"""

import json
from pathlib import Path

import pytest
import torch
from pool import run_ranks
from ranks import train
from torch import Tensor

from framework.checkpoint.commit import newest_of_run
from framework.data.shards import LatentSample, open_shards
from framework.diffusion.video_file import to_uint8
from framework.programs import build
from framework.programs.generate import Generator
from framework.programs.sample import LocalModel, load_model
from framework.run import recipe_of_run

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


def psnr(a_thwc: Tensor, b_thwc: Tensor) -> float:
    """Of two uint8 videos, in dB."""
    error = (a_thwc.double() - b_thwc.double()).square().mean() / 255**2
    return float(-10 * torch.log10(error))


@pytest.mark.timeout(900)
def test_overfit(rabbit_latents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [f"run={run}", f"data.streams=[{{path: {rabbit_latents}}}]", f"validation.shards=[{rabbit_latents}]"]
    run_ranks(train, 2, ROOT / "recipes/overfit.yaml", words, timeout=800)

    recipe = recipe_of_run(run)
    encoders = build.build_encoders(recipe)
    sample = open_shards(rabbit_latents).read(0)
    assert isinstance(sample, LatentSample)
    (clip,) = to_uint8(encoders.tokenizer.decode(torch.from_numpy(sample.latents).float()[None]))
    stills = [*clip, clip.double().mean(0)]
    best_still = max(psnr(still.expand(clip.shape), clip) for still in stills)

    model = LocalModel(load_model(recipe, newest_of_run(run), weights="ema", device=CPU))
    generator = Generator(recipe, encoders, recipe.data.buckets[0].clip, CPU)
    for seed in (1, 2):
        (video,) = generator(model, [sample.captions[0].text], seed=seed)
        result = psnr(video, clip)
        print(f"seed {seed}: {result:.2f} dB, best still {best_still:.2f} dB")
        assert result >= 20
        assert result >= best_still + 2

    validation = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    losses = {weights: [v["loss"] for v in validation if v["weights"] == weights] for weights in ("raw", "ema")}
    assert all(values[-1] < 0.1 * values[0] for values in losses.values()), losses
