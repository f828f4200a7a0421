"""Wan's autoencoder as a tokenizer, against diffusers called directly on tiny random weights."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import recipe_tree
from tiny_wan import VAES, save_vae

from framework.layers import apply_overrides
from framework.recipe import Recipe, build_recipe
from framework.shapes import Strides
from framework.tokenizer import wan
from framework.tokenizer.config import (
    TokenizerConfig,
    WanConfig,
    tokenizer_channels,
    tokenizer_strides,
    tokenizer_version,
)
from framework.tokenizer.tokenizer import Tokenizer, build_tokenizer

STRIDES = {"2.1": Strides(4, 8, 8, causal=True), "2.2": Strides(4, 16, 16, causal=True)}
CHANNELS = {"2.1": 4, "2.2": 6}


def config(path: Path, dtype: str = "float32") -> TokenizerConfig:
    return TokenizerConfig(name="wan", wan=WanConfig(str(path), "bfloat16" if dtype == "bfloat16" else "float32"))


def build(path: Path, dtype: str = "float32") -> Tokenizer:
    return build_tokenizer(config(path, dtype))


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("version", VAES)
def test_encode_and_decode_are_those_of_diffusers(version: str, tmp_path: Path) -> None:
    model = save_vae(tmp_path / "vae", version)
    tokenizer = build(tmp_path)
    video, channels = pixels(2, 3, 9, 32, 16), CHANNELS[version]
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
    with torch.no_grad():
        raw = model.encode(video).latent_dist.mode()
        expected = (raw - mean) * (1 / std)  # as the pipelines write it
        latents = tokenizer.encode(video)
        stride = STRIDES[version].height
        assert latents.shape == (2, channels, 3, 32 // stride, 16 // stride) and latents.dtype == torch.float32
        torch.testing.assert_close(latents, expected, atol=1e-6, rtol=1e-5)
        noisy = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
        decoded = tokenizer.decode(noisy)
        assert decoded.shape == video.shape and not decoded.requires_grad
        torch.testing.assert_close(decoded, model.decode(noisy / (1 / std) + mean).sample, atol=5e-5, rtol=0)
    assert decoded.std() > 0.01  # not a constant, with which anything agrees


@pytest.mark.parametrize("version", VAES)
def test_what_is_known_without_building_is_what_is_built(version: str, tmp_path: Path) -> None:
    save_vae(tmp_path, version)
    tokenizer = build(tmp_path)
    assert tokenizer_strides(config(tmp_path)) == tokenizer.strides == STRIDES[version]
    assert tokenizer_channels(config(tmp_path)) == tokenizer.channels == CHANNELS[version]
    assert tokenizer_version(config(tmp_path)) == tokenizer.version
    assert len(tokenizer.latent_mean) == len(tokenizer.latent_scale) == tokenizer.channels


def test_a_longer_clip_begins_like_a_shorter_one(tmp_path: Path) -> None:
    save_vae(tmp_path, "2.1")
    tokenizer, video = build(tmp_path), pixels(1, 3, 9, 16, 16)
    whole, short = tokenizer.encode(video), tokenizer.encode(video[:, :, :5])
    torch.testing.assert_close(whole[:, :, :2], short, atol=1e-6, rtol=0)
    for coded in (tokenizer.encode, tokenizer.decode):
        with pytest.raises(ValueError, match="give it the whole clip at once"):
            coded(video, first=False)


def test_the_version_follows_weights_configuration_and_dtype(tmp_path: Path) -> None:
    save_vae(tmp_path, "2.1")
    versions = [tokenizer_version(config(tmp_path)), tokenizer_version(config(tmp_path, "bfloat16"))]
    (tmp_path / "notes.txt").write_text("not read")
    assert tokenizer_version(config(tmp_path)) == versions[0]
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    versions.append(tokenizer_version(config(tmp_path)))
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("0.9", "0.8"))
    versions.append(tokenizer_version(config(tmp_path)))
    assert len(set(versions)) == 4 and all(version.startswith("wan-") for version in versions)


def test_bfloat16_computes_in_it_and_returns_float32(tmp_path: Path) -> None:
    save_vae(tmp_path, "2.1")
    video = pixels(1, 3, 5, 16, 16)
    rough, exact = build(tmp_path, "bfloat16").encode(video), build(tmp_path).encode(video)
    assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.1


def test_the_recipe_knows_the_channels_before_anything_is_built(tmp_path: Path) -> None:
    save_vae(tmp_path / "vae", "2.1")

    def load(channels_in: int, channels_out: int) -> Recipe:
        tree = recipe_tree(Path("latents"), Path("run"))
        tree["tokenizer"] = {"name": "wan", "wan": {"path": str(tmp_path)}}
        words = [f"model.in_channels={channels_in}", f"model.out_channels={channels_out}"]
        return build_recipe(apply_overrides(tree, words))

    assert tokenizer_channels(load(4, 4).tokenizer) == 4
    with pytest.raises(ValueError, match=r"4 latent channels .* set model\.in_channels=4 model\.out_channels=4"):
        load(8, 8)


def test_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("", str(tmp_path / "absent")):
        with pytest.raises(ValueError, match=r"is no directory: set it to a directory of an AutoencoderKLWan"):
            tokenizer_channels(TokenizerConfig(name="wan", wan=WanConfig(path)))
    with pytest.raises(ValueError, match=r"config\.json is missing: set it to"):
        tokenizer_strides(config(tmp_path))
    save_vae(tmp_path, "2.1")
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    for change, words in (
        ({"_class_name": "AutoencoderKL"}, "of the class AutoencoderKL: set it to"),
        ({"latents_std": [1.0]}, "must have z_dim numbers"),
        ({"latents_std": None}, "can't be used, TypeError"),
    ):
        file.write_text(json.dumps(stored | change))
        with pytest.raises(ValueError, match=words):
            build(tmp_path)
    file.write_text("{")
    with pytest.raises(ValueError, match="can't be used"):
        build(tmp_path)
    file.write_text(json.dumps(stored))
    monkeypatch.setattr(wan, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'cuboid\[wan\]'"):
        build(tmp_path)
    monkeypatch.undo()
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["quant_conv.bias"], tensors["encoder.conv_in.bias"]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"lack encoder\.conv_in\.bias and 1 more: copy it anew"):
        build(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="saved as safetensors"):
        tokenizer_version(config(tmp_path))


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_vae(tmp_path, "2.2")
    tokenizer = build(tmp_path)
    with pytest.raises(ValueError, match="the nearest are 5 and 9"):
        tokenizer.encode(pixels(1, 3, 7, 16, 16))
    with pytest.raises(ValueError, match="the nearest are 16 and 32"):
        tokenizer.encode(pixels(1, 3, 5, 24, 16))
    with pytest.raises(ValueError, match="takes 3"):
        tokenizer.encode(pixels(1, 1, 5, 16, 16))
    with pytest.raises(ValueError, match="this tokenizer has 6"):
        tokenizer.decode(pixels(1, 4, 2, 1, 1))


def test_reading_the_configuration_imports_neither_torch_nor_diffusers(tmp_path: Path) -> None:
    save_vae(tmp_path, "2.1")
    program = (
        "import sys; from framework.tokenizer.config import *;"
        f"c = TokenizerConfig(name='wan', wan=WanConfig({str(tmp_path)!r}));"
        "print(tokenizer_channels(c), tokenizer_strides(c).height, tokenizer_version(c)[:4],"
        "sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "4 8 wan- []"


def test_threads_share_it(tmp_path: Path) -> None:
    """The model keeps a clip's past in itself: the loader's thread and the loop's may not mix theirs."""
    save_vae(tmp_path / "vae", "2.1")
    tokenizer = build(tmp_path / "vae")
    clips = [pixels(1, 3, 9, 16, 16) * scale for scale in (1.0, 0.5)]
    alone = [tokenizer.encode(clip) for clip in clips]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(tokenizer.encode, clips), alone, strict=True))
