"""Reading diffusers' directories: boxes, bytes, what is refused by which name (whole models: test_wan_parity.py)."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from wan_cases import CASES

from framework.models.config import ModelConfig
from framework.models.export import read_whole
from framework.models.saved import is_diffusers
from framework.models.source import parts_of
from framework.models.weights import INDEX, SINGLE, DiffusersSource, runs_of


def _save(directory: Path, **config: Any) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(3), "blocks.0.attn2.norm_added_q.weight": torch.ones(1)}, directory / SINGLE)


def read_all(source: DiffusersSource) -> dict[str, torch.Tensor]:
    return {name: read_whole(source, name) for name in source.shapes()}


def test_private_keys_and_the_unused_norm_are_left_out(tmp_path: Path) -> None:
    _save(tmp_path, _class_name="WanTransformer3DModel", _diffusers_version="0.39", num_layers=3, patch_size=[1, 4, 4])
    source = DiffusersSource(str(tmp_path))
    assert source.config == ModelConfig(num_layers=3, patch_size=(1, 4, 4))
    assert {name: value.tolist() for name, value in read_all(source).items()} == {"a": [1, 1, 1]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (3, 4, 5), (2, 3, 1, 4), (0, 3)], ids=str)
def test_boxes_are_torchs_slices(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    """Every kind of box of every dtype, into contiguous and strided memory of the same and of another dtype."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(shape, generator=generator).to(dtype)
    save_file({"a": whole, "b": torch.ones(7, dtype=dtype)}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text("{}")
    source, expected = DiffusersSource(str(tmp_path)), 0
    for _ in range(10):
        edges = [torch.randint(0, n + 1, (2,), generator=generator).sort().values.tolist() for n in shape]
        index = tuple(slice(low, high) for low, high in edges)
        for target in (dtype, torch.float32, torch.float64):
            out = torch.full(whole[index].shape, torch.nan, dtype=target)
            strided = torch.full((*out.shape, 2), torch.nan, dtype=target)[..., 0]
            for each in (out, strided):
                source.read("a", tuple(low for low, _ in edges), each)
                assert torch.equal(each, whole[index].to(target))
                expected += each.numel() * dtype.itemsize
    assert source.bytes_read == expected


def test_runs_and_parts_by_hand() -> None:
    assert list(runs_of((4, 6), (1, 0), (2, 6))) == [(6, 12)]
    assert list(runs_of((4, 6), (1, 2), (2, 3))) == [(8, 3), (14, 3)]
    assert list(runs_of((2, 3, 4), (0, 1, 0), (2, 2, 4))) == [(4, 8), (16, 8)]
    assert list(runs_of((), (), ())) == [(0, 1)]
    assert list(parts_of((5, 4), 8)) == [((0, 0), (2, 4)), ((2, 0), (2, 4)), ((4, 0), (1, 4))]
    assert list(parts_of((2, 9), 8)) == [((0, 0), (1, 9)), ((1, 0), (1, 9))]
    assert list(parts_of((), 8)) == [((), ())]


def test_no_more_bytes_are_read_than_asked_for(tmp_path: Path) -> None:
    """As the operating system counts them: a quarter of the columns, as a tp rank has of `to_out.0`."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**asdict(CASES["medium"].config))
    model.save_pretrained(tmp_path)
    source = DiffusersSource(str(tmp_path))

    def bytes_of_process() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])

    own = -bytes_of_process() + bytes_of_process()  # of the measurement itself
    before, needed = bytes_of_process(), 0
    for name, shape in source.shapes().items():
        if len(shape) == 2:
            out = torch.empty(shape[0], shape[1] // 4)
            source.read(name, (0, shape[1] // 2), out)
            assert torch.equal(out, model.state_dict()[name][:, shape[1] // 2 : shape[1] // 2 + shape[1] // 4])
            needed += out.numel() * 4
    read = bytes_of_process() - before - own
    assert needed > 1_000_000 and needed <= read <= 1.001 * needed


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
        ({"num_layers": "three"}, "config.json"),
        ({"patch_size": [1, 2]}, "patch_size"),
        ({"patch_size": 2}, "config.json"),
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


def _flip_the_header(directory: Path) -> None:
    data = bytearray((directory / SINGLE).read_bytes())
    data[8] ^= 255
    (directory / SINGLE).write_bytes(data)


def _index(weight_map: Any) -> Callable[[Path], Any]:
    return lambda directory: (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _steal(directory: Path) -> None:
    """An index that names a file beside the directory, which is there and is fine."""
    shutil.copy(directory / SINGLE, directory.parent / "other.safetensors")
    _index({"a": "../other.safetensors"})(directory)


def _quantise(directory: Path) -> None:
    save_file({"a": torch.ones(3, dtype=torch.int8)}, directory / SINGLE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, f"{SINGLE} can't be read, it may be truncated"),
        (_flip_the_header, f"{SINGLE} can't be read"),
        (lambda directory: (directory / SINGLE).write_bytes(b""), f"{SINGLE} can't be read"),
        (_index({"a": SINGLE, "b": "part-2.safetensors"}), "lacks part-2.safetensors"),
        (_index({"a": SINGLE, "b": SINGLE}), f"{SINGLE} lacks b"),
        (_steal, r"index.json names '../other.safetensors', which isn't a file of its own directory"),
        (_index({"a": "/etc/passwd"}), "isn't a file of its own directory"),
        (_index({"a": ".."}), "isn't a file of its own directory"),
        (_index(["a"]), "no weight_map"),
        (_index({"a": 3}), "no weight_map"),
        (lambda directory: (directory / INDEX).write_text("[]"), "no JSON object"),
        (lambda directory: (directory / SINGLE).unlink(), f"lacks {SINGLE}"),
        (lambda directory: (directory / "config.json").unlink(), "lacks config.json"),
        (lambda directory: (directory / "config.json").write_text("{"), "no JSON"),
        (lambda directory: (directory / "config.json").write_bytes(b"\xff\xfe"), "no JSON"),
        (_quantise, "a is stored as I8"),
    ],
)
def test_a_damaged_directory_is_refused(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    _save(tmp_path / "dir")
    damage(tmp_path / "dir")
    with pytest.raises(ValueError, match=message):
        DiffusersSource(str(tmp_path / "dir"))


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    _save(tmp_path)
    save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "other.safetensors")
    _index({"a": SINGLE, "b": "other.safetensors"})(tmp_path)
    with pytest.raises(ValueError, match=r"holds a, and .* does too"):
        DiffusersSource(str(tmp_path))


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    _save(tmp_path)
    source = DiffusersSource(str(tmp_path))
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{SINGLE} has become shorter"):
        read_all(source)


class Planted:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self._mark,)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_is_refused_and_does_not_run(name: str, tmp_path: Path) -> None:
    """Alone it is refused with the fix; beside safetensors nobody looks at it."""
    directory, mark = tmp_path / "dir", tmp_path / "it-ran"
    _save(directory)
    data = pickle.dumps(Planted(mark))
    (directory / name).write_bytes(data)
    assert read_whole(DiffusersSource(str(directory)), "a").tolist() == [1, 1, 1]
    (directory / SINGLE).unlink()
    with pytest.raises(ValueError, match=rf"{name} only: a pickle, which can run code .*safe_serialization=True"):
        DiffusersSource(str(directory))
    (directory / SINGLE).write_bytes(data)  # under the other name
    with pytest.raises(ValueError, match="can't be read"):
        DiffusersSource(str(directory))
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists()


def test_a_pipeline_has_its_transformers_in_subfolders(tmp_path: Path) -> None:
    _save(tmp_path / "transformer", num_layers=2)
    source = DiffusersSource(str(tmp_path))
    assert (source.config.num_layers, source.name, source.notes) == (2, str(tmp_path / "transformer"), ())
    _save(tmp_path / "transformer_2", num_layers=3)
    assert DiffusersSource(f"{tmp_path}:transformer_2").config.num_layers == 3
    assert DiffusersSource(f"{tmp_path}:transformer").notes == ()
    (note,) = DiffusersSource(str(tmp_path)).notes
    assert "transformer (the expert of high noise) was taken" in note and f"{tmp_path}:transformer_2" in note
    for place in (f"{tmp_path}:..", f"{tmp_path}:a/b", f"{tmp_path}:"):
        with pytest.raises(ValueError, match="DIR:SUBFOLDER"):
            DiffusersSource(place)
    with pytest.raises(ValueError, match=r"vae is no directory saved by diffusers: it lacks config\.json"):
        DiffusersSource(f"{tmp_path}:vae")
    assert is_diffusers(str(tmp_path)) and is_diffusers(f"{tmp_path}:vae") and not is_diffusers(str(tmp_path / "vae"))
    assert not is_diffusers(f"s3:/{tmp_path}")  # although there is such a directory
    _save(tmp_path / "a:b", num_layers=4)
    assert DiffusersSource(str(tmp_path / "a:b")).config.num_layers == 4


def test_the_configuration_passes_through_omegaconf() -> None:
    merged = OmegaConf.merge(
        OmegaConf.structured(ModelConfig), OmegaConf.create({"patch_size": [1, 4, 2], "eps": 1e-5})
    )
    assert OmegaConf.to_object(merged) == ModelConfig(patch_size=(1, 4, 2), eps=1e-5)
    assert asdict(ModelConfig())["patch_size"] == (1, 2, 2)
