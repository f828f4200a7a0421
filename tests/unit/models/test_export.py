"""What export writes against the libraries it is for: diffusers, safetensors, torch and PEFT read it."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Final

import pytest
import torch
from safetensors import safe_open
from sources import Held
from torch import Tensor, nn
from wan_cases import BATCH, CASES, randomise, worst

from framework.checkpoint.interchange import write_dict
from framework.models.adapters import ADAPTER_FILE
from framework.models.config import LoraConfig, is_adapter
from framework.models.export import Merged, plan_tensors, write_diffusers, write_lora
from framework.models.weights import INDEX, DiffusersSource

CASE: Final = CASES["tiny"]


def reference() -> nn.Module:
    """diffusers' model with random weights."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**asdict(CASE.config))
    randomise(model, torch.Generator().manual_seed(1))
    return model


def predict(model: nn.Module) -> Tensor:
    """diffusers' output for fixed inputs."""
    latent, generator = CASE.latent, torch.Generator().manual_seed(2)
    shape = (BATCH, CASE.config.in_channels, latent.frames, latent.height, latent.width)
    noisy = torch.randn(shape, generator=generator)
    text = torch.randn(BATCH, CASE.text_length, CASE.config.text_dim, generator=generator)
    dtype = model.get_parameter("patch_embedding.weight").dtype
    with torch.no_grad():
        output: Tensor = model(noisy.to(dtype), torch.tensor([400.0, 900.0]), text.to(dtype), return_dict=False)[0]
    return output


def equal_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """The same names, dtypes and bits."""
    return ours.keys() == theirs.keys() and all(
        a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in ((ours[name], theirs[name]) for name in ours)
    )


@pytest.mark.parametrize("max_bytes", [20_000, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_loads_what_it_would_have_saved(dtype: torch.dtype, max_bytes: int, tmp_path: Path) -> None:
    """Names of files, index, configuration, dtypes, bits and output are those of diffusers' own save and load."""
    from diffusers import WanTransformer3DModel

    model = reference()
    write_diffusers(
        tmp_path / "ours", CASE.config, Held(model.state_dict()), dtype=dtype, card="the card",
        shard_bytes=max_bytes,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "whole")
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "whole", torch_dtype=dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_bytes)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "ours", torch_dtype=dtype)
    assert equal_bits(dict(loaded.state_dict()), dict(theirs.state_dict()))
    assert torch.equal(predict(loaded), predict(theirs))

    names = [{file.name for file in (tmp_path / each).iterdir()} for each in ("ours", "theirs")]
    assert names[0] == names[1] | {"README.md"}
    assert len(names[1]) > 4 if max_bytes == 20_000 else len(names[1]) == 2
    if INDEX in names[0]:
        ours, other = (json.loads((tmp_path / each / INDEX).read_text()) for each in ("ours", "theirs"))
        assert ours["weight_map"] == other["weight_map"]
        assert ours["metadata"]["total_size"] == other["metadata"]["total_size"]
    configs = [json.loads((tmp_path / each / "config.json").read_text()) for each in ("ours", "theirs")]
    for config in configs:
        config.pop("_diffusers_version")
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]
    for file in names[1] - {INDEX, "config.json"}:
        with safe_open(tmp_path / "ours" / file, "pt") as a, safe_open(tmp_path / "theirs" / file, "pt") as b:
            assert equal_bits({n: a.get_tensor(n) for n in a.keys()}, {n: b.get_tensor(n) for n in b.keys()})  # noqa: SIM118
            assert a.metadata() == b.metadata()
    again = DiffusersSource(str(tmp_path / "ours"))
    assert again.config == CASE.config and again.shapes() == {n: tuple(t.shape) for n, t in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_loads_one_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """As tensors only, in their order; what diffusers keeps in float32 is in float32."""
    tensors = {"norm1.a": torch.randn(3, 5), "scalar": torch.tensor(2.5), "none": torch.empty(0, 4)}
    tensors |= {f"b.{i}": torch.randn(i + 1, 7) for i in range(12)}
    file = tmp_path / "folder" / "weights.pt"
    write_dict(file, Held(tensors), plan_tensors(Held(tensors), dtype))
    expected = {name: tensor.to(dtype if name != "norm1.a" else torch.float32) for name, tensor in tensors.items()}
    assert equal_bits(torch.load(file, weights_only=True), expected)
    assert list(torch.load(file, weights_only=True)) == list(tensors)
    assert [path.name for path in file.parent.iterdir()] == ["weights.pt"]


def adapted() -> tuple[nn.Module, LoraConfig]:
    """diffusers' model with random adapters by PEFT: tensors by our names are those of its adapters."""
    import peft

    lora = LoraConfig(rank=3, alpha=5.0, targets=["*.to_q", "*.to_out.0", "*.ffn.net.2"])
    model = reference()
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=r".*(to_q|to_out\.0|ffn\.net\.2)"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_" in name:
                value.normal_(0.0, 0.3, generator=generator)
    return model, lora


def our_names(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's names of adapted linears -> ours."""
    return {
        name.replace(".base_layer.", ".").replace(".default.", "."): value for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_load_in_diffusers_and_merged_ones_agree(dtype: torch.dtype, tmp_path: Path) -> None:
    """Three ways to the same output: adapters as PEFT made them, our file of them loaded by diffusers, and our merged
    model without any; the unadapted model is far off.
    """
    from diffusers import WanTransformer3DModel

    model, lora = adapted()
    expected, source = predict(model), Held(our_names(model))
    write_lora(tmp_path / "lora", lora, source, dtype=dtype, card="the card")
    loaded = reference()
    loaded.load_lora_adapter(tmp_path / "lora", weight_name=ADAPTER_FILE, prefix="transformer")
    config = loaded.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (3, 5)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert worst(predict(loaded), expected) <= tolerance

    merged = Merged(source, lora)
    assert merged.shapes() == {name: tuple(value.shape) for name, value in reference().state_dict().items()}
    write_diffusers(tmp_path / "merged", CASE.config, merged, dtype=dtype, card="the card")
    whole = WanTransformer3DModel.from_pretrained(tmp_path / "merged")
    assert worst(predict(whole), expected) <= (5e-6 if dtype == torch.float32 else 5e-2)
    assert worst(predict(reference()), expected) > 0.1


def test_boxes_of_a_merged_weight_are_those_of_the_whole() -> None:
    model, lora = adapted()
    source = Merged(Held(our_names(model)), lora)
    name = "blocks.1.ffn.net.2.weight"
    part = torch.full((5, 7), torch.nan)
    source.read(name, (3, 2), part)
    layer = model.get_submodule("blocks.1.ffn.net.2")
    whole = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.allclose(part, whole[3:8, 2:9], rtol=0, atol=1e-6)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    state, dtype = dict(reference().state_dict()), torch.float32

    def write(tensors: dict[str, Tensor], name: str = "out") -> None:
        write_diffusers(tmp_path / name, CASE.config, Held(tensors), dtype=dtype, card="the card")

    with pytest.raises(ValueError, match=r"isn't the whole model: proj_out\.bias is absent"):
        write({name: value for name, value in state.items() if name != "proj_out.bias"})
    with pytest.raises(ValueError, match=r"extra is of shape .* no parameter"):
        write(state | {"extra": torch.ones(2)})
    with pytest.raises(ValueError, match=r"proj_out\.bias is of shape \(3,\).* of shape \(16,\)"):
        write(state | {"proj_out.bias": torch.ones(3)})
    with pytest.raises(ValueError, match="isn't the whole model"):
        write(our_names(adapted()[0]))
    with pytest.raises(ValueError, match="no adapters"):
        write_lora(tmp_path / "out", LoraConfig(2), Held(state), dtype=dtype, card="the card")
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("full", "file"):
        with pytest.raises(ValueError, match="is there already"):
            write(state, name)
    with pytest.raises(ValueError, match="file is there already"):
        write_dict(tmp_path / "file", Held(state), plan_tensors(Held(state), dtype))
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "a").read_text() == "kept"
    (tmp_path / "out.partial").mkdir()  # somebody's own, not ours to remove
    write(state)
    assert (tmp_path / "out.partial").is_dir()
    (tmp_path / "empty").mkdir()
    write(state, "empty")
    assert (tmp_path / "empty" / "README.md").read_text() == "the card"


class Breaking(Held):
    """Fails at its fifth tensor."""

    def read(self, name: str, offset: tuple[int, ...], out: Tensor) -> None:
        if name == list(self.shapes())[5]:
            raise OSError("the disk is gone")
        super().read(name, offset, out)


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    source = Breaking(reference().state_dict())
    with pytest.raises(OSError, match="gone"):
        write_diffusers(tmp_path / "out", CASE.config, source, dtype=torch.float32, card="the card")
    with pytest.raises(OSError, match="gone"):
        write_dict(tmp_path / "out.pt", source, plan_tensors(source, torch.float32))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Held({"a": torch.ones(2)})
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(ValueError, match=r"has room for 0\.00105 GB"):
        write_dict(tmp_path / "out.pt", source, plan_tensors(source, torch.float32))
    assert list(tmp_path.iterdir()) == []


MEASURE: Final = """
import sys
from pathlib import Path
import torch
from framework.models.config import ModelConfig
from framework.checkpoint.interchange import write_dict
from framework.models.export import plan_tensors, write_diffusers
from framework.plan.parameters import parameter_shapes

class Made:
    name = "made"
    def shapes(self): return {p.name: p.shape for p in parameter_shapes(CONFIG)}
    def read(self, name, offset, out): out.fill_(1.5)

CONFIG = ModelConfig(num_attention_heads=8, num_layers=6, ffn_dim=4096, text_dim=1024)
size = 4 * sum(p.num_elements for p in parameter_shapes(CONFIG))
# Not ru_maxrss, which a child inherits from the process that started it.
memory = lambda key: int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) << 10
torch.ones(1 << 20).to(torch.bfloat16)
before, out = memory("VmRSS"), Path(sys.argv[2])
if sys.argv[1] == "torch":
    write_dict(out, Made(), plan_tensors(Made(), torch.float32))
else:
    write_diffusers(out, CONFIG, Made(), dtype=torch.float32, card="", shard_bytes=10**8)
print(size, memory("VmHWM") - before)
"""


@pytest.mark.parametrize("form", ["diffusers", "torch"])
def test_memory_is_a_part_and_not_the_model(form: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, form, str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    size, grown = map(int, result.stdout.split())
    files = [tmp_path / "out"] if form == "torch" else list((tmp_path / "out").glob("*.safetensors"))
    assert size > 400_000_000 and sum(file.stat().st_size for file in files) > size
    for file in files:
        file.unlink()
    print(f"{form}: {size / 1e6:.0f} MB written with {grown / 1e6:.0f} MB more memory")
    assert grown < 80_000_000


def test_the_file_of_adapters_holds_them_and_nothing_else(tmp_path: Path) -> None:
    model, lora = adapted()
    write_lora(tmp_path / "out", lora, Held(our_names(model)), dtype=torch.float32, card="the card")
    with safe_open(tmp_path / "out" / ADAPTER_FILE, "pt") as file:
        stored = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    ours = {name: value for name, value in our_names(model).items() if is_adapter(name)}
    assert equal_bits({name: stored[name] for name in ours}, ours) and len(stored) == len(ours)
