"""How well a run gives back the clip that it was trained on: samples beside the real clip, as a picture and in dB.

    python tools/compare.py RUN [--seeds 1 2] [--weights ema|raw] [--out sheet.png] [--json]

A sample by the clip's own caption is compared with the tokenizer's reconstruction of the clip, so that the transformer
alone is judged. The best still picture (the best of the clip's frames and their mean) is what motion has to beat.

    PSNR = -10 log10(mean squared difference of pixels in [0, 1])
"""

import argparse
import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from framework.checkpoint.find import open_checkpoint
from framework.checkpoint.read import CheckpointReader
from framework.data.shards import LatentSample, open_shards
from framework.diffusion.sampler import Experts
from framework.diffusion.video_file import to_uint8, write_contact_sheet
from framework.parallel.mesh import lone_mesh
from framework.programs import build
from framework.programs.generate import Generator
from framework.programs.local import LocalModel
from framework.programs.sample import load_model
from framework.run import recipe_of_run


def psnr(a_thwc: Tensor, b_thwc: Tensor) -> float:
    """Of two videos with values 0..255, in dB."""
    error = (a_thwc.double() - b_thwc.double()).square().mean() / 255**2
    return float(-10 * torch.log10(error))


def compare(run: Path, *, seeds: list[int], weights: Literal["ema", "raw"], out: Path | None) -> dict[str, object]:
    """Sample a run's first clip with every seed. Returns the numbers, writes the picture."""
    recipe = recipe_of_run(run)
    encoders, device = build.Encoders(recipe), build.this_device()
    sample = open_shards(recipe.data.streams[0].path).read(0)
    if not isinstance(sample, LatentSample):
        raise SystemExit(f"{recipe.data.streams[0].path} holds videos; this tool compares with latents")
    (clip,) = to_uint8(encoders.tokenizer.decode(torch.from_numpy(sample.latents).float()[None]))
    best_still = max(psnr(still.expand(clip.shape), clip) for still in (*clip, clip.double().mean(0)))
    model = LocalModel(load_model(recipe, CheckpointReader(*open_checkpoint(str(run))), weights=weights, device=device))
    generator = Generator(recipe, encoders, recipe.data.buckets[0].clip, device, lone_mesh())
    rows, results = [("the clip, as its tokenizer gives it back", clip)], {}
    for seed in seeds:
        (video,) = generator(Experts.lone(model), [sample.captions[0].text], seed=seed)
        results[seed] = psnr(video, clip)
        rows.append((f"sample, seed {seed}: {results[seed]:.1f} dB", video))
    if out is not None:
        write_contact_sheet(out, rows)
    return {"psnr": results, "best_still": best_still, "weights": weights, "caption": sample.captions[0].text}


def main() -> None:
    parser = argparse.ArgumentParser(description="Samples beside the clip that a run was trained on.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = compare(arguments.run, seeds=arguments.seeds, weights=arguments.weights, out=arguments.out)
    if arguments.json:
        print(json.dumps(result))
        return
    for seed, value in result["psnr"].items():  # type: ignore[attr-defined]
        print(f"seed {seed}: {value:.2f} dB")
    print(f"best still picture: {result['best_still']:.2f} dB ({result['weights']} weights, {result['caption']!r})")


if __name__ == "__main__":
    main()
