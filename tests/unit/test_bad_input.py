"""Bad input through the real command: exit status 2, one message with the values and the fix, and nothing made."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from stores import save_steps
from tiny import write_latents

from framework.checkpoint.fence import own
from framework.recipe import load_recipe, resolve_auto
from framework.run import Run, open_attempt, store_recipe
from framework.shapes import ClipShape

RANK = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@dataclass(frozen=True)
class Answer:
    status: int
    out: str
    message: str


def cuboid(*words: str, folder: Path, environment: dict[str, str] | None = None) -> Answer:
    """Run the command in a folder, with no rank in its environment but what is given."""
    kept = {name: value for name, value in os.environ.items() if name not in (*RANK, "LOCAL_WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, "-m", "framework.cli", *words],
        env=kept | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Answer(result.returncode, result.stdout, result.stderr)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(*words: str, folder: Path, environment: dict[str, str] | None = None) -> str:
    """The one message of a command that must fail for the user's mistake and make nothing."""
    before = names(folder)
    answer = cuboid(*words, folder=folder, environment=environment)
    assert "Traceback" not in answer.message, answer.message
    assert (answer.status, answer.out) == (2, ""), answer
    assert answer.message.startswith("error: ") and answer.message.count("error: ") == 1
    assert len(answer.message.splitlines()) == 1 and len(answer.message) < 700, answer.message
    assert names(folder) == before
    return answer.message


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["mesh.dp=0"], ["mesh.dp=0 must be at least 1"]),
        (["mesh.tp=5"], ["mesh.tp=5 must divide the model", "use one of 1, "]),
        (["mesh.dp=two"], ["mesh.dp", "'two'", "int"]),
        (
            ["mesh.ring=3", "data.buckets=[{frames: 5, height: 16, width: 16}]"],
            ["ring=3 is longer than the 2 tokens of a clip", "at most 2"],
        ),
        (["mesh.ulysses=16"], ["ulysses=16 needs a head for each of its ranks", "raise ring instead"]),
        (["data.buckets.0.ring=0"], ["ring=0", "must be at least 1"]),
        (["zero.stage=4"], ["zero.stage=4", "1, 2 and 3"]),
        (["data.streams=[]"], ["data.streams is empty", "name at least one"]),
        (["model.num_layer=3"], ["model.num_layer", "'num_layers'"]),
        (["text.minilm.max_length=9"], ["text.minilm is set but text.name is 'bytes'", "text.name=minilm"]),
        (["tokenizer.dct.scale=0.7"], ["holds latents of the tokenizer dct-", "the recipe's is dct-", "cuboid encode"]),
        (["data.buckets.0.frames=9"], ["no sample fits the bucket 9x16x16", "8 samples", "5x16x16"]),
        (["data.streams.0.path=nowhere"], ["no shard directory nowhere", "cuboid prepare"]),
        (["run="], ["run"]),
        (["run=''"], ["no run directory", "add run=DIR"]),
        (["mesh.dp"], ["'mesh.dp' isn't of the form key=value"]),
    ],
    ids=lambda value: " ".join(value) if value and "=" in value[0] else "",
)
def test_train_with_a_mistake_in_a_key(tiny_recipe: Path, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    message = refused("train", str(tiny_recipe), *words, folder=tmp_path)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("tinny.yaml", None, ["no such recipe", "did you mean", "tiny.yaml"]),
        ("broken.yaml", "mesh: {dp: 2", ["broken.yaml isn't valid YAML", "line 1"]),
        ("a.yaml", "base: [tiny.yaml, a.yaml]", ["form a cycle", "a.yaml ->"]),
        ("heir.yaml", "base: tiny.yaml\nmehs: {dp: 2}", ["heir.yaml: mehs", "'mesh'"]),
        ("list.yaml", "[1, 2]", ["list.yaml must hold keys and values"]),
    ],
)
def test_train_on_a_file_with_a_mistake(
    tiny_recipe: Path, tmp_path: Path, name: str, text: str | None, parts: list[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    message = refused("train", name, folder=tmp_path)
    assert [part for part in parts if part not in message] == []


def test_a_mesh_that_the_ranks_are_not_there_for(tiny_recipe: Path, tmp_path: Path) -> None:
    message = refused("train", str(tiny_recipe), "mesh.dp=2", folder=tmp_path, environment=RANK)
    assert "2 * 1 * 1 * 1 against 3 ranks; mesh.dp=3 uses 3 of the ranks" in message


@pytest.mark.parametrize("environment", [{"RANK": "0"}, RANK | {"RANK": "first"}])
def test_half_a_place_in_the_environment(tiny_recipe: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    assert "RANK" in refused("train", str(tiny_recipe), folder=tmp_path, environment=environment)


def test_an_empty_shard_directory(tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused("train", str(tiny_recipe), "data.streams.0.path=empty", folder=tmp_path)
    assert "no shards in empty: make them with `cuboid prepare" in message


def test_a_truncated_shard_is_named(tiny_recipe: Path, tiny_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_shards, tmp_path / "cut")
    file = sorted((tmp_path / "cut").rglob("*.mds"))[1]
    size = file.stat().st_size
    os.truncate(file, size - 5)
    message = refused("train", str(tiny_recipe), "data.streams.0.path=cut", folder=tmp_path)
    assert f"{file.relative_to(tmp_path)} has {size - 5} bytes instead of {size}" in message


def test_another_clip_shape_is_counted(tiny_recipe: Path, tmp_path: Path) -> None:
    write_latents(tmp_path / "wide", clip=ClipShape(5, 16, 32), num_samples=3)
    message = refused("train", str(tiny_recipe), "data.streams.0.path=wide", folder=tmp_path)
    assert "no sample fits the bucket 5x16x16: the 3 samples of the streams are 5x16x32 (" in message


def store_run(recipe_path: Path) -> Path:
    """A run as it lies there after the start of its first attempt."""
    recipe = resolve_auto(load_recipe(recipe_path, []))
    path = Path(recipe.run)
    assert open_attempt(path, 0)
    store_recipe(Run(path, 0), recipe, (), dp=1)
    return path


def test_a_stored_run_of_another_model(tiny_recipe: Path, tmp_path: Path) -> None:
    store_run(tiny_recipe)
    message = refused("train", str(tiny_recipe), "model.num_layers=3", folder=tmp_path)
    assert "model.num_layers=3 differs from 2 in the run" in message and "resume.allow=[model.num_layers]" in message
    message = refused("train", str(tiny_recipe), "train.steps=1", folder=tmp_path)
    assert "train.steps=1 is below the run's 4" in message


def test_a_damaged_checkpoint_is_refused_before_a_rank_starts(tiny_recipe: Path, tmp_path: Path) -> None:
    checkpoints = store_run(tiny_recipe) / "checkpoints"
    save_steps(checkpoints, [1, 2])
    (checkpoints / "step-00000002-0000/model-00000.distcp").unlink()
    message = refused("train", str(tiny_recipe), folder=tmp_path)
    assert "step-00000002-0000/model-00000.distcp is missing" in message
    assert "resume.fall_back=true goes on from the one before it, of step 1" in message


def test_places_where_checkpoints_cannot_go(tiny_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for word, part in (
        ("store=file", "file is a file"),
        ("store=gs://b/x", "s3://"),
        ("local=s3://b/x", "of the node"),
    ):
        assert part in refused("train", str(tiny_recipe), f"checkpoint.{word}", folder=tmp_path)


def test_weights_to_begin_with_that_are_not_there(tiny_recipe: Path, tmp_path: Path) -> None:
    assert "there is no directory nowhere" in refused("train", str(tiny_recipe), "init_from=nowhere", folder=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "empty has no checkpoint yet" in refused("train", str(tiny_recipe), "init_from=empty", folder=tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_store_of_another_run(tiny_recipe: Path, tmp_path: Path) -> None:
    own(save_steps(tmp_path / "store", [1]), "somebody", "runs/other")
    message = refused("train", str(tiny_recipe), "checkpoint.store=store", folder=tmp_path)
    assert "store holds the checkpoints of another run, runs/other" in message and "init_from" in message


def test_another_store_than_the_run_s(tiny_recipe: Path, tmp_path: Path) -> None:
    store_run(tiny_recipe)
    message = refused("train", str(tiny_recipe), "checkpoint.store=elsewhere", folder=tmp_path)
    assert "checkpoint.store=elsewhere differs from" in message


def test_sampling_from_what_is_no_run(tmp_path: Path) -> None:
    message = refused("sample", str(tmp_path), "--prompt", "x", "--out", "out.mp4", folder=tmp_path)
    assert f"{tmp_path} is no run directory: it has no recipe.yaml" in message


def test_sampling_from_a_run_without_a_checkpoint(tiny_recipe: Path, tmp_path: Path) -> None:
    run = store_run(tiny_recipe)
    assert "has no checkpoint yet" in refused("sample", str(run), "--prompt", "x", "--out", "o.mp4", folder=tmp_path)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["trian"]),
        (["train"], ["recipe"]),
        (["train", "tiny.yaml", "--steps", "3"], ["--steps"]),
        (["sample", "run", "--out", "x.mp4"], ["--prompt"]),
    ],
)
def test_words_that_are_no_command(tiny_recipe: Path, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    message = refused(*words, folder=tmp_path)
    assert [part for part in parts if part.lower() not in message.lower()] == []


def test_validation_clips_that_are_trained_on(tiny_recipe: Path, tiny_shards: Path, tmp_path: Path) -> None:
    words = ["validation.every=2", f"validation.shards=[{tiny_shards}]"]
    message = refused("train", str(tiny_recipe), *words, folder=tmp_path)
    assert "8 of the validation clips are also trained on, clip0@0 for one" in message
    assert "validation.held_out=false" in message


def test_validation_shards_that_are_not_there(tiny_recipe: Path, tmp_path: Path) -> None:
    words = ["validation.every=2", "validation.shards=[nowhere]"]
    assert "no shard directory nowhere" in refused("train", str(tiny_recipe), *words, folder=tmp_path)


def test_the_launcher_ends_with_the_status_of_its_ranks(tiny_recipe: Path, tmp_path: Path) -> None:
    """A mistake that only a rank can see: a directory can't be made where a file is."""
    (tmp_path / "file").touch()
    answer = cuboid("train", str(tiny_recipe), "run=file/run", folder=tmp_path)
    assert answer.status != 0 and answer.message


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["attention.kernel=cudnn"], ["attention.kernel=cudnn", "needs a GPU", "attention.kernel=aten can"]),
        (["attention.kernel=flash"], ["needs a GPU", "flash-attn-4", "pip install", "attention.kernel=aten can"]),
        (["attention.kernel=flashy"], ["attention.kernel", "flashy"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_a_kernel_that_is_not_here(tiny_recipe: Path, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    """A machine without GPUs, by its environment, and without flash-attn, by what the tests install."""
    message = refused("train", str(tiny_recipe), *words, folder=tmp_path, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert [part for part in parts if part not in message] == []
    message = refused(
        "verify", str(tiny_recipe), *words, "--mesh", "dp=1", folder=tmp_path, environment={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert [part for part in parts if part not in message] == []


def test_a_machine_with_gpus_but_without_flash_attn(tiny_recipe: Path, tmp_path: Path) -> None:
    """The check comes before any rank, and so before torch finds that there is no such GPU."""
    words = ["attention.kernel=flash", "precision.parameters=bfloat16", "model.attention_head_dim=32"]
    message = refused("train", str(tiny_recipe), *words, folder=tmp_path, environment={"CUDA_VISIBLE_DEVICES": "0"})
    assert "is installed: `pip install flash-attn-4`" in message and "attention.kernel=cudnn can" in message
