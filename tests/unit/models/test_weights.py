"""Reading diffusers' directories: what is refused, and by which name. (What is read: test_wan_parity.py.)"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from framework.models.config import ModelConfig
from framework.models.weights import INDEX, SINGLE, DiffusersSource


def _save(directory: Path, **config: Any) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(3), "blocks.0.attn2.norm_added_q.weight": torch.ones(1)}, directory / SINGLE)


def test_private_keys_and_the_unused_norm_are_left_out(tmp_path: Path) -> None:
    _save(tmp_path, _class_name="WanTransformer3DModel", _diffusers_version="0.39", num_layers=3, patch_size=[1, 4, 4])
    source = DiffusersSource(str(tmp_path))
    assert source.config == ModelConfig(num_layers=3, patch_size=(1, 4, 4))
    assert source.shapes() == {"a": (3,)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_layer": 3}, "num_layer"),
        ({"_class_name": "CogVideoXTransformer3DModel"}, "CogVideoX"),
        ({"attention_head_dim": 15}, "attention_head_dim % 2 == 0"),
        ({"image_dim": 4}, r"40 \* 128 = 5120: set added_kv_proj_dim=5120"),
        ({"pos_embed_seq_len": 4}, "pos_embed_seq_len=4"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"freq_dim": 7}, "freq_dim"),
        ({"num_layers": 0}, "num_layers"),
        ({"patch_size": [1, 2]}, "patch_size"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_a_configuration_that_is_not_ours_is_refused_by_name(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _save(tmp_path, **config)
    with pytest.raises(ValueError, match=message):
        DiffusersSource(str(tmp_path))


def _truncate(directory: Path) -> None:
    (directory / SINGLE).write_bytes((directory / SINGLE).read_bytes()[:-4])


def _lose_a_part(directory: Path) -> None:
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE, "b": "part-2.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "may be truncated"),
        (_lose_a_part, "lacks part-2.safetensors"),
        (lambda directory: (directory / SINGLE).unlink(), f"lacks {SINGLE}"),
        (lambda directory: (directory / "config.json").unlink(), "lacks config.json"),
        (lambda directory: (directory / "config.json").write_text("{"), "no JSON"),
    ],
)
def test_a_damaged_directory_is_refused(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    _save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        DiffusersSource(str(tmp_path))


def test_pickles_and_paths_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    _save(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ValueError, match=r"names \.\./other\.safetensors, which lies outside its directory"):
        DiffusersSource(str(tmp_path))
    (tmp_path / INDEX).unlink()
    (tmp_path / SINGLE).unlink()
    trap = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {trap}",)

    torch.save(Evil(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has diffusion_pytorch_model\.bin and no safetensors: a pickle can run code"):
        DiffusersSource(str(tmp_path))
    assert not trap.exists()


def test_parts_of_a_pipeline(tmp_path: Path) -> None:
    for part, layers in (("transformer", 2), ("transformer_2", 3)):
        (tmp_path / part).mkdir()
        _save(tmp_path / part, num_layers=layers)
    assert DiffusersSource(str(tmp_path)).config.num_layers == 2
    assert DiffusersSource(f"{tmp_path}:transformer_2").config.num_layers == 3
    with pytest.raises(ValueError, match="transformer_3 is no directory saved by diffusers"):
        DiffusersSource(f"{tmp_path}:transformer_3")


def test_the_configuration_passes_through_omegaconf() -> None:
    merged = OmegaConf.merge(
        OmegaConf.structured(ModelConfig), OmegaConf.create({"patch_size": [1, 4, 2], "eps": 1e-5})
    )
    assert OmegaConf.to_object(merged) == ModelConfig(patch_size=(1, 4, 2), eps=1e-5)
    assert asdict(ModelConfig())["patch_size"] == (1, 2, 2)
