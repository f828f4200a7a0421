"""Encoders that a run keeps on its device, counted from files whose sizes are known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from described import machine
from safetensors.numpy import save_file

from framework.diffusion.config import SamplesConfig
from framework.forecast.encoders import resident_bytes
from framework.forecast.memory import plan_memory
from framework.parallel.config import MeshShape
from framework.recipe import Recipe, load_recipe
from framework.text.config import HfConfig, MinilmConfig, TextConfig
from framework.tokenizer.config import TokenizerConfig, WanConfig

SAMPLES = SamplesConfig(every=10, prompts=["a rabbit"])


def wan_files(folder: Path) -> Path:
    """Of 3 x 4 + 5 = 17 weights, stored in half precision, with numbers for 16 channels."""
    numbers = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16, "z_dim": 16}
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", **numbers}))
    tensors = {"a": np.zeros((3, 4), np.float16), "b": np.zeros(5, np.float16)}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return folder


def hf_files(folder: Path) -> Path:
    """Two files of 100 and 23 bytes, which torch's older format beside them doesn't add to."""
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    for name, size in (("model-1.safetensors", 100), ("model-2.safetensors", 23), ("pytorch_model.bin", 1000)):
        (folder / name).write_bytes(bytes(size))
    return folder


def of(text: TextConfig, tokenizer: TokenizerConfig, samples: SamplesConfig = SAMPLES) -> Recipe:
    return replace(Recipe(), text=text, tokenizer=tokenizer, samples=samples)


def test_text_counts_as_stored_and_the_tokenizer_in_its_dtype(tmp_path: Path) -> None:
    text = TextConfig(name="hf", hf=HfConfig(path=str(hf_files(tmp_path))))
    dct, minilm = TokenizerConfig(), TextConfig(name="minilm", minilm=MinilmConfig())
    assert resident_bytes(of(text, dct)) == 123
    assert resident_bytes(of(text, dct, SamplesConfig())) == 0, "nothing is sampled on the way"
    assert resident_bytes(of(minilm, dct)) == pytest.approx(90.9e6, rel=1e-3)
    (tmp_path / "vae").mkdir()
    wan_files(tmp_path / "vae")
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        wan = TokenizerConfig(name="wan", wan=WanConfig(str(tmp_path), dtype))  # type: ignore[arg-type]
        assert resident_bytes(of(TextConfig(), wan)) == 17 * size
        assert resident_bytes(of(text, wan)) == 123 + 17 * size


def test_they_are_in_the_memory_of_a_rank(tiny_recipe: Path) -> None:
    """And what the allocator reserves besides counts for them as well."""
    hardware = machine(device__headroom=1.5)
    words = ["samples.every=10", "samples.prompts=[a rabbit]"]
    bare, more = (
        load_recipe(tiny_recipe, each)
        for each in ([], [*words, "text.name=minilm", "text.bytes=null", "model.text_dim=384"])
    )
    without, with_them = (plan_memory(each, MeshShape(1, 1, 1, 1), hardware) for each in (bare, more))
    assert with_them.parts()["encoders"] == 4 * 22_713_216
    assert sum(with_them.parts().values()) == pytest.approx(with_them.total)
    assert with_them.headroom - without.headroom > 0.5 * 4 * 22_713_216 * 0.99


def test_files_that_arent_here_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text.hf.path=.*is no directory: set text.hf.path to a local directory"):
        resident_bytes(of(TextConfig(name="hf", hf=HfConfig(path=str(tmp_path / "absent"))), TokenizerConfig()))
