"""Checkpoints out to diffusers, PEFT and torch, and in again, on any mesh."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import ranks
import torch
from plain_dcp import newest_folder, plain_load
from pool import RanksFailed, run_ranks
from tiny import write_recipe
from typer.testing import CliRunner

from framework.checkpoint.interchange import ExportRequest, export, import_weights
from framework.cli import app
from framework.models.config import ModelConfig
from framework.models.export import read_whole, write_diffusers
from framework.models.weights import DiffusersSource
from framework.recipe import load_recipe

WORDS = ["mesh.dp=2", "train.steps=3", "ema.decay=0.5", "optimizer.lr=1e-2"]
LORA = ["lora.rank=2", "lora.alpha=3", "train.trainable=[proj_out.*]"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("whole"), tiny_shards, WORDS)
    run_ranks(ranks.train, 2, path, [])
    return path


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("lora"), tiny_shards, [*WORDS, *LORA])
    run_ranks(ranks.train, 2, path, [])
    return path


def command(*words: object) -> tuple[int, str]:
    """The command in this process: its status and what it printed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_diffusers_loads_an_export(recipe: Path, tmp_path: Path, weights: str, dtype: str) -> None:
    from diffusers import WanTransformer3DModel

    run, out = recipe.parent / "run", tmp_path / "model"
    status, text = command(
        "checkpoint", "export", run, "--out", out, "--weights", weights, "--dtype", dtype, "--format", "diffusers"
    )
    assert status == 0 and f"{weights} weights of step 3" in text
    kind = getattr(torch, dtype)
    model = WanTransformer3DModel.from_pretrained(out, torch_dtype=kind)
    stored = plain_load(newest_folder(run))
    prefix = "ema." if weights == "ema" else "model."
    expected = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    state = model.state_dict()
    assert state.keys() == expected.keys()
    # What diffusers keeps in float32, whatever it is asked for, was never rounded.
    assert all(torch.equal(state[name], value.to(state[name].dtype)) for name, value in expected.items())
    card = (out / "README.md").read_text()
    assert "| step | 3 |" in card and f"| dtype | {dtype} |" in card
    with pytest.raises(ValueError, match="is there already"):
        export(str(run), out, ExportRequest("diffusers"))


def test_several_files(recipe: Path, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    config = load_recipe(recipe, []).model
    original = WanTransformer3DModel(**asdict(config))
    original.save_pretrained(tmp_path / "original", max_shard_size="20KB")
    source = DiffusersSource(str(tmp_path / "original"))
    write_diffusers(tmp_path / "copy", source.config, source, dtype=torch.float32, card="", shard_bytes=20_000)
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 3
    ours, theirs = (
        json.loads((tmp_path / d / "diffusion_pytorch_model.safetensors.index.json").read_text())
        for d in ("copy", "original")
    )
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    copy = WanTransformer3DModel.from_pretrained(tmp_path / "copy")
    assert all(torch.equal(copy.state_dict()[name], value) for name, value in original.state_dict().items())


def test_torch_loads_an_export(recipe: Path, tmp_path: Path) -> None:
    run, out = recipe.parent / "run", tmp_path / "weights.pt"
    export(str(run), out, ExportRequest("torch", "raw", "float32"))
    read, stored = torch.load(out, weights_only=True), plain_load(newest_folder(run))
    assert read.keys() == {key.removeprefix("model.") for key in stored if key.startswith("model.")}
    assert all(torch.equal(value, stored[f"model.{name}"]) for name, value in read.items())


def test_scaled_rotary_positions_go_out_to_torch_only(tmp_path: Path, tiny_shards: Path) -> None:
    """diffusers' configuration has no field for them, so that the weights would be run at other positions."""
    path = write_recipe(tmp_path, tiny_shards, ["train.steps=1", "rope.time=interpolation", "rope.factor=2"])
    run_ranks(ranks.train, 1, path, [])
    for form in ("diffusers", "lora"):
        status, text = command("checkpoint", "export", tmp_path / "run", "--out", tmp_path / "x", "--format", form)
        assert status == 1 and "rope.time=interpolation rope.factor=2, which diffusers has no field for" in text
    status, text = command("checkpoint", "export", tmp_path / "run", "--out", tmp_path / "x", "--format", "torch")
    assert status == 0 and "rotary positions with time=interpolation factor=2" in text


def test_adapters_and_merged_weights(adapted: Path, tmp_path: Path) -> None:
    """The base with PEFT's adapters by diffusers' loader computes what the merged export does."""
    from diffusers import WanTransformer3DModel
    from safetensors.torch import load_file

    run = str(adapted.parent / "run")
    with pytest.raises(ValueError, match="add --merge-lora, or export them by --format lora"):
        export(run, tmp_path / "x", ExportRequest("diffusers"))
    export(run, tmp_path / "merged", ExportRequest("diffusers", "raw", "float32", merge=True))
    export(run, tmp_path / "lora", ExportRequest("lora", "raw", "float32"))
    merged = WanTransformer3DModel.from_pretrained(tmp_path / "merged").state_dict()
    stored = plain_load(newest_folder(adapted.parent / "run"))
    base = {
        key.removeprefix("model."): value
        for key, value in stored.items()
        if key.startswith("model.") and "lora" not in key
    }
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed and all(".attn" in name and name.endswith(".weight") for name in changed)
    model = WanTransformer3DModel(**asdict(load_recipe(adapted, []).model))
    model.load_state_dict(base)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    assert all(name.startswith("transformer.blocks.") for name in load_file(file))
    model.load_lora_adapter(tmp_path / "lora", weight_name=file.name, prefix="transformer")
    model.fuse_lora()
    fused = {
        name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora_" not in name
    }
    for name in base:
        torch.testing.assert_close(fused[name], merged[name], rtol=0, atol=1e-6)


def test_a_run_begins_with_the_weights_of_another(recipe: Path, tmp_path: Path, tiny_shards: Path) -> None:
    """Of a run (its average), of a diffusers directory, and with adapters beside them, on meshes of their own."""
    run = recipe.parent / "run"
    export(str(run), tmp_path / "model", ExportRequest("diffusers", "ema", "float32"))
    stored = plain_load(newest_folder(run))
    lr = ["optimizer.lr=1e-30", "optimizer.weight_decay=0", "train.steps=1"]
    cases = [
        ("a", 2, run, ["mesh.tp=2", "mesh.dp=1", "zero.stage=3"]),
        ("b", 3, tmp_path / "model", ["mesh.dp=3", "zero.engine=fsdp2"]),
        ("c", 2, newest_folder(run), ["mesh.ring=2", "mesh.dp=1", "lora.rank=2"]),
    ]
    for name, num_ranks, place, words in cases:
        new = write_recipe(tmp_path, tiny_shards, [f"run={tmp_path / name}", f"init_from={place}", *lr, *words])
        run_ranks(ranks.train, num_ranks, new, [])
        begun = plain_load(newest_folder(tmp_path / name))
        names = [key.removeprefix("ema.") for key in stored if key.startswith("ema.")]
        assert all(torch.equal(begun[f"model.{n}"], stored[f"ema.{n}"]) for n in names), name
    manifest = json.loads((newest_folder(tmp_path / "a") / "manifest.json").read_text())
    assert manifest["origin"]["parents"] == [str(run)]


def test_weights_of_another_model_are_refused(recipe: Path, tmp_path: Path, tiny_shards: Path) -> None:
    words = [f"init_from={recipe.parent / 'run'}", "mesh.dp=2", "train.steps=1"]
    other = write_recipe(tmp_path, tiny_shards, [*words, "model.ffn_dim=48"])
    with pytest.raises(RanksFailed, match=r"has the shape \(32, 24\) in .*step-00000003-0000, \(48, 24\) in the model"):
        run_ranks(ranks.train, 2, other, [])


def test_import_and_the_verbs_that_look(recipe: Path, tmp_path: Path) -> None:
    run = recipe.parent / "run"
    export(str(run), tmp_path / "model", ExportRequest("diffusers", "raw", "float32"))
    assert command("checkpoint", "import", tmp_path / "model", tmp_path / "store")[0] == 0
    with pytest.raises(ValueError, match="has checkpoints already"):
        import_weights(str(tmp_path / "model"), str(tmp_path / "store"))
    imported = plain_load(newest_folder_of(tmp_path / "store"))
    stored = plain_load(newest_folder(run))
    assert all(torch.equal(value, stored[key]) for key, value in imported.items()) and len(imported) > 50
    status, text = command("checkpoint", "list", run)
    assert status == 0 and "step-00000003-0000" in text and "dp=2" in text and "deepspeed 2" in text
    status, text = command("checkpoint", "show", run, "--step", 3)
    assert status == 0 and "samples: 12" in text and "exp_avg: " in text and "num_layers=2" in text
    assert command("checkpoint", "keep", run, 3, "the-best")[0] == 0
    assert "the-best" in command("checkpoint", "list", run)[1]
    status, text = command("checkpoint", "verify", run, "--all")
    assert status == 0 and "all whole" in text
    assert command("checkpoint", "diff", run, newest_folder(run))[0] == 0
    status, text = command("checkpoint", "diff", run, tmp_path / "store")
    assert status == 1 and "exp_avg.proj_out.weight: only in" in text
    again = tmp_path / "again"
    export(str(tmp_path / "store"), again, ExportRequest("diffusers", "raw", "float32"))
    a, b = DiffusersSource(str(again)), DiffusersSource(str(tmp_path / "model"))
    assert all(torch.equal(read_whole(a, name), read_whole(b, name)) for name in b.shapes())
    file = newest_folder_of(tmp_path / "store") / "model-00000.distcp"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    status, text = command("checkpoint", "verify", tmp_path / "store")
    assert status == 1
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        export(str(tmp_path / "store"), tmp_path / "no", ExportRequest("torch", "raw"))
    assert not (tmp_path / "no").exists()


def newest_folder_of(store: Path) -> Path:
    return max(path.parent for path in store.glob("step-*/manifest.json"))


PEAK = """
import sys
from pathlib import Path
from framework.checkpoint.interchange import ExportRequest, export
store, out, format = sys.argv[1:]
# Not ru_maxrss, which a child inherits from the process that started it: then nothing ever grows.
memory = lambda key: int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])
before = memory("VmRSS")
export(store, Path(out), ExportRequest(format, "raw", "float32"))
print((memory("VmHWM") - before) >> 10)
"""


@pytest.mark.parametrize("format", ["diffusers", "torch"])
def test_an_export_holds_one_tensor_at_a_time(tmp_path: Path, format: str) -> None:
    """A model of 180 MB, whose largest tensor has 4 MB."""
    from diffusers import WanTransformer3DModel

    config = ModelConfig(num_layers=11, num_attention_heads=4, ffn_dim=2048, text_dim=64, freq_dim=64)
    WanTransformer3DModel(**asdict(config)).save_pretrained(tmp_path / "model")
    import_weights(str(tmp_path / "model"), str(tmp_path / "store"))
    size = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors")) >> 20
    words = [sys.executable, "-c", PEAK, str(tmp_path / "store"), str(tmp_path / "out"), format]
    grown = int(subprocess.run(words, capture_output=True, text=True, check=True, env=os.environ).stdout)
    assert size > 170 and grown < 60, f"{grown} MB for a model of {size} MB"
