"""Latents and texts of encoders that aren't here: what is known of them, and what is refused."""

import json
from pathlib import Path

import pytest
import ranks
from pool import run_ranks
from tiny import write_recipe

from framework.data.shards import open_shards
from framework.launch.check import check_start
from framework.programs.encode import encode
from framework.recipe import bucket_tokens, load_recipe
from framework.shapes import Strides
from framework.text.config import text_length, text_masked, text_width
from framework.text.encoder import build_text_encoder
from framework.tokenizer.config import tokenizer_channels, tokenizer_strides, tokenizer_version
from framework.tokenizer.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[3]
MOVIE_GEN = [
    "tokenizer={name: latents, latents: {time: 8, causal: false}}",
    "text={name: stored, stored: {width: 6144, max_length: 256, mask: true}}",
    "model.in_channels=16",
    "model.out_channels=16",
    "model.text_dim=6144",
    "data.buckets=[{frames: 256, height: 768, width: 768}]",
]


def test_planning_needs_their_numbers_alone(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tmp_path), MOVIE_GEN)
    assert tokenizer_strides(recipe.tokenizer) == Strides(8, 8, 8, causal=False)
    assert tokenizer_channels(recipe.tokenizer) == 16
    assert (text_width(recipe.text), text_length(recipe.text), text_masked(recipe.text)) == (6144, 256, True)
    assert bucket_tokens(recipe, 0).num_tokens == 32 * 48 * 48


def test_pixels_and_captions_are_refused(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tmp_path), MOVIE_GEN)
    with pytest.raises(ValueError, match=r"tokenizer.name=latents .* can neither encode nor decode pixels"):
        build_tokenizer(recipe.tokenizer)
    with pytest.raises(ValueError, match=r"text.name=stored .* can embed no caption"):
        build_text_encoder(recipe.text)


@pytest.fixture(scope="module")
def with_texts(rabbit_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rabbit's latents with its caption's embedding."""
    out = tmp_path_factory.mktemp("texts") / "latents"
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [])
    encode(recipe, str(rabbit_latents.parent / "videos"), str(out), dtype="float16", text=True)
    return out


def words(shards: Path) -> list[str]:
    """The encoders that only say of themselves what the shards of the rabbit do."""
    held = open_shards(str(shards))
    return [
        f"tokenizer={{name: latents, latents: {{channels: 72, version: {held.tokenizer_version}}}}}",
        f"text={{name: stored, stored: {{width: 256, max_length: 64, mask: true, version: {held.text_version}}}}}",
    ]


def test_training_is_that_with_the_encoders(with_texts: Path, tmp_path: Path) -> None:
    found = []
    for name, own in (("made", []), ("stored", words(with_texts))):
        common = [
            f"run={tmp_path / name}",
            f"data.streams=[{{path: {with_texts}}}]",
            *("model.num_layers=1", "mesh.dp=1", "train.steps=2", "validation.every=0"),
        ]
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"base: {ROOT / 'recipes/quickstart.yaml'}\nsamples: {{every: 0}}\n")
        run_ranks(ranks.train, 1, path, [*common, *own])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line)["loss"] for line in lines])
    assert len(found[0]) == 2 and found[0] == found[1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["tokenizer.latents.version=''"], r"the recipe's is not named: .* tokenizer.latents.version=dct-"),
        (["tokenizer.latents.version=wan-1"], r"holds latents of the tokenizer dct-.*, the recipe's is wan-1"),
        (["text.stored.version=''"], r"the recipe's is not named: .* text.stored.version=bytes/1-64"),
        (["samples={every: 2, prompts: [a]}"], r"samples.every=2 with tokenizer.name=latents and text.name=stored"),
        (["data.streams=[{path: VIDEOS}]"], r"videos holds videos, and tokenizer.name=latents can't encode them"),
        (["data.streams=[{path: LATENTS}]"], r"latents holds captions without embeddings, and text.name=stored can't"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_starts(
    changed: list[str], message: str, with_texts: Path, rabbit_latents: Path
) -> None:
    places = {"VIDEOS": rabbit_latents.parent / "videos", "LATENTS": rabbit_latents}
    for name, place in places.items():
        changed = [word.replace(name, str(place)) for word in changed]
    common = [f"data.streams=[{{path: {with_texts}}}]", "validation.every=0", "samples.every=0"]
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [*common, *words(with_texts), *changed])
    with pytest.raises(ValueError, match=message):
        check_start(recipe, num_ranks=None, num_gpus=0)


def test_latents_need_whole_strides() -> None:
    with pytest.raises(ValueError, match=r"tokenizer.latents.time=0 must be at least 1"):
        load_recipe(ROOT / "recipes/quickstart.yaml", ["tokenizer={name: latents, latents: {time: 0}}"])


def test_the_version_is_what_is_said(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tmp_path), [*MOVIE_GEN, "tokenizer.latents.version=tae-3"])
    assert tokenizer_version(recipe.tokenizer) == "tae-3"
