"""Recipes: layers, alternatives, overrides, and that a mistake is refused by its key."""

import re
from pathlib import Path
from typing import Any

import pytest
from tiny import recipe_tree

from framework.recipe import (
    Recipe,
    apply_overrides,
    build_recipe,
    check_trained,
    flatten,
    load_recipe,
    read_recipe_layers,
    resolve_auto,
    to_yaml,
)

RECIPES = Path(__file__).parents[2] / "recipes"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def load(*overrides: str) -> Recipe:
    """The tiny recipe under overrides; its shards aren't looked at."""
    return build_recipe(apply_overrides(recipe_tree(Path("latents"), Path("run")), list(overrides)))


def refused(*overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(*overrides)
    return str(caught.value)


def test_defaults_lie_below_the_file() -> None:
    recipe = load()
    assert (recipe.model.num_layers, recipe.data.global_batch, recipe.optimizer.lr) == (2, 4, 1e-3)
    assert (recipe.seed, recipe.data.window, recipe.optimizer.betas, recipe.mesh.tp) == (0, 8, (0.9, 0.95), 1)


def test_bases_are_relative_to_their_file_and_read_depth_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """deep < a < b < top; the working directory doesn't matter."""
    write(tmp_path / "x" / "y" / "deep.yaml", "seed: 1\ntrain: {steps: 1}\nlog: {every: 1}\nrun: deep")
    write(tmp_path / "x" / "a.yaml", "base: y/deep.yaml\nseed: 2\ntrain: {steps: 2}\nlog: {every: 2}")
    write(tmp_path / "b.yaml", "seed: 3\ntrain: {steps: 3}")
    top = write(tmp_path / "z" / "top.yaml", "base: [../x/a.yaml, ../b.yaml]\nseed: 4")
    monkeypatch.chdir("/")
    assert read_recipe_layers(top) == {"seed": 4, "train": {"steps": 3}, "log": {"every": 2}, "run": "deep"}


def test_a_base_may_be_reached_twice(tmp_path: Path) -> None:
    """A diamond is no cycle: the shared base is laid a second time, over what its first heir said."""
    write(tmp_path / "root.yaml", "seed: 1\nrun: root")
    write(tmp_path / "a.yaml", "base: root.yaml\nseed: 2\ntrain: {steps: 2}")
    write(tmp_path / "b.yaml", "base: root.yaml\nrun: b")
    top = write(tmp_path / "top.yaml", "base: [a.yaml, b.yaml]")
    assert read_recipe_layers(top) == {"seed": 1, "run": "b", "train": {"steps": 2}}


def test_a_cycle_is_shown(tmp_path: Path) -> None:
    write(tmp_path / "start.yaml", "base: a.yaml")
    write(tmp_path / "a.yaml", "base: sub/b.yaml")
    write(tmp_path / "sub" / "b.yaml", "base: ../a.yaml")
    with pytest.raises(ValueError, match=r"cycle: \S+/a.yaml -> \S+/sub/b.yaml -> \S+/a.yaml$"):
        read_recipe_layers(tmp_path / "start.yaml")
    with pytest.raises(ValueError, match=r"cycle: \S+/me.yaml -> \S+/me.yaml$"):
        read_recipe_layers(write(tmp_path / "me.yaml", "base: me.yaml"))


def test_a_file_that_is_not_there_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "overfit.yaml", "")
    with pytest.raises(ValueError, match=r"no such recipe: \S+/overfti.yaml; did you mean \S+/overfit.yaml\?"):
        read_recipe_layers(tmp_path / "overfti.yaml")
    with pytest.raises(ValueError, match=r"no such recipe: \S+/gone.yaml"):
        read_recipe_layers(write(tmp_path / "heir.yaml", "base: gone.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [", r"r.yaml isn't valid YAML: .*line 1"),
        ("- seed", r"r.yaml must hold keys and values, not a list"),
        ("seed: !!python/object:os.getcwd x", r"r.yaml isn't valid YAML"),
        ("sede: 1", r"r.yaml: sede=1: .*'seed'"),
        pytest.param("base: 3", r"base"),
        pytest.param("base: [3]", r"base"),
        pytest.param("base:", r"base"),
        pytest.param("data: {streams: {path: x}}", r"data"),
        pytest.param("seed: 1\nseed: 2", r"seed"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe_layers(write(tmp_path / "r.yaml", text))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(ValueError, match=r"r.yaml isn't valid YAML"):
        read_recipe_layers(tmp_path / "r.yaml")


def test_dicts_merge_and_lists_replace(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "data: {streams: [{path: p}, {path: q}], global_batch: 5}")
    top = write(tmp_path / "b.yaml", "base: a.yaml\ndata: {streams: [{path: r}]}")
    assert read_recipe_layers(top) == {"data": {"streams": [{"path": "r"}], "global_batch": 5}}


def test_another_name_drops_the_old_section(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "text: {name: bytes, bytes: {max_length: 3}, dropout: 0.2}")
    top = write(tmp_path / "b.yaml", "base: a.yaml\ntext: {name: hf, hf: {path: t5}}")
    assert read_recipe_layers(top) == {"text": {"name": "hf", "hf": {"path": "t5"}, "dropout": 0.2}}
    same = write(tmp_path / "c.yaml", "base: a.yaml\ntext: {name: bytes}")
    assert read_recipe_layers(same)["text"]["bytes"] == {"max_length": 3}
    recipe = load("text.name=minilm", "model.text_dim=384")
    assert recipe.text.minilm is not None and recipe.text.bytes is None


def test_another_name_drops_the_section_of_the_default(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "text: {bytes: {max_length: 3}}")
    assert read_recipe_layers(write(tmp_path / "b.yaml", "base: a.yaml\ntext: {name: hf}"))["text"] == {"name": "hf"}


def test_the_chosen_alternative_gets_its_defaults() -> None:
    flow = load("flow.timesteps.name=logit_normal", "flow.shift.name=tokens").flow
    assert flow.timesteps.logit_normal is not None and flow.timesteps.logit_normal.std == 1.0
    assert flow.shift.tokens is not None and flow.shift.tokens.base_tokens == 4096 and flow.shift.fixed is None


def test_an_unchosen_alternative_is_refused_with_both_ways_out() -> None:
    message = refused("flow.timesteps.logit_normal.std=2")
    assert "flow.timesteps.logit_normal is set but flow.timesteps.name is 'uniform'" in message
    assert "set flow.timesteps.name=logit_normal or leave flow.timesteps.logit_normal out" in message


@pytest.mark.parametrize(
    ("word", "named", "nearest"),
    [
        ("optimizer.ler=1", "optimizer.ler", "'lr'"),
        ("modle.num_layers=1", "modle", "'model'"),
        ("model.num_layer=1", "model.num_layer", "'num_layers'"),
        ("data.buckets.0.hight=16", "hight", "'height'"),
        ("flow.shift.fixed.valeu=1", "flow.shift.fixed.valeu", "'value'"),
    ],
)
def test_an_unknown_key_names_the_nearest(word: str, named: str, nearest: str) -> None:
    message = refused(word)
    assert named in message and nearest in message


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("train.steps=many", "train.steps", "many"),
        ("train.steps=1.5", "train.steps", "1.5"),
        ("mesh.dp=two", "mesh.dp", "two"),
        ("optimizer.lr=fast", "optimizer.lr", "fast"),
        ("train.deterministic=maybe", "train.deterministic", "maybe"),
        ("zero.engine=fsdp", "zero.engine", "deepspeed"),
        ("optimizer.schedule=cos", "optimizer.schedule", "cosine"),
        ("seed=", "seed", "None"),
        ("mesh=null", "mesh", "not Optional"),
        ("data.streams.0=3", "data.streams", "3"),
        ("flow.range=3", "flow.range", "int"),
        pytest.param("optimizer.betas=[1]", "optimizer.betas", "1"),
        pytest.param("flow.range=[a, b]", "flow.range", "a"),
        pytest.param("model=3", "model", "3"),
    ],
)
def test_a_wrong_type_names_the_key_and_the_value(word: str, key: str, value: str) -> None:
    message = refused(word)
    assert re.search(rf"(^|[ :]){re.escape(key)}(?!\w)", message) and value in message and "\n" not in message


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("mesh.dp=0", "mesh.dp=0"),
        ("mesh.tp=5", "mesh.tp=5 must divide the model"),
        ("zero.stage=4", "zero.stage=4"),
        ("data.streams=[]", "data.streams is empty"),
        ("data.buckets=[]", "data.buckets is empty"),
        ("data.global_batch=0", "data.global_batch=0"),
        ("data.streams.0.weight=0", "weight 0"),
        ("data.buckets.0.frames=6", "the nearest are 5 and 9"),
        ("data.buckets.0.height=20", "the nearest are 16 and 24"),
        ("data.buckets.0.width=8", "patch size 2"),
        ("tokenizer.dct.coefficients=9", "set model.in_channels=9 model.out_channels=9"),
        ("text.name=minilm", "set model.text_dim=384"),
        ("flow.range=[1, 0]", "flow.range=[1.0, 0.0]"),
        ("ema.decay=1", "ema.decay=1"),
        ("text.dropout=2", "text.dropout=2"),
        ("validation.every=5", "validation.shards is empty"),
        ("samples.every=5", "samples.prompts is empty"),
        ("flow.timesteps={per_frame: true, stratified: true}", "set one of them to false"),
        ("attention.pattern={name: block_causal, block_causal: {frames: 0}}", "block_causal.frames=0"),
        ("attention.pattern.window.frames=4", "set attention.pattern.name=window or leave"),
        *[
            pytest.param(word, word.partition("=")[0])
            for word in (
                "log.every=0",
                "optimizer.lr=-1",
                "optimizer.lr=.nan",
                "optimizer.warmup=-1",
                "optimizer.betas=[2, 2]",
                "text.bytes.max_length=0",
                "flow.shift.fixed.value=0",
                "sampler.shift=-1",
                "validation.every=-1",
                "samples.every=-1",
            )
        ],
    ],
)
def test_a_value_that_cannot_be_is_refused(word: str, key: str) -> None:
    assert key in refused(word)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2E+4", 2e4), (".5", 0.5), ("3", 3.0), ("1.0e-2", 0.01)])
def test_floats_are_read_as_people_write_them(text: str, value: float) -> None:
    """YAML 1.1 takes 1e-3 for a string, as it has no point."""
    recipe = load(f"optimizer.lr={text}")
    assert recipe.optimizer.lr == value and isinstance(recipe.optimizer.lr, float)
    assert load(f"optimizer.eps={text}").optimizer.eps == value


def test_overrides_reach_into_lists() -> None:
    recipe = load("data.streams.0.weight=3", "data.buckets.0.fps=12", "data.streams.0.path=other")
    assert (recipe.data.streams[0].weight, recipe.data.buckets[0].fps) == (3.0, 12.0)
    assert recipe.data.streams[0].path == "other"
    assert "data.streams.1.path: '1' isn't an index into a list of 1" in refused("data.streams.1.path=x")
    assert "data.streams.x: 'x' isn't an index" in refused("data.streams.x=1")


def test_later_overrides_win() -> None:
    assert load("seed=1", "seed=2").seed == 2


@pytest.mark.parametrize("word", ["seed", "=3", "seed:3"])
def test_words_that_are_no_override_are_refused(word: str) -> None:
    assert f"{word!r} isn't of the form key=value" in refused(word)
    assert "isn't valid YAML" in refused("seed=[1")
    assert "there is no 'a' below the value 0" in refused("seed=0", "seed.a=1")


WORDS: list[list[str]] = [
    [],
    ["optimizer.lr=1e-3", "optimizer.betas=[0.9, 0.99]", "mesh.dp=auto", "data.buckets.0.fps=23.976"],
    ["flow.timesteps.name=logit_normal", "flow.range=[0.875, 1]", "samples.prompts=['a: #b', \"it's\", 'yes', '1e3']"],
    ["attention.pattern.name=window", "attention.pattern.window.sinks=2", "flow.timesteps.per_frame=true"],
    ["run='007'", "text.name=minilm", "model.text_dim=384", "optimizer.decay_steps=7", "resume.allow=[seed]"],
]


@pytest.mark.parametrize("words", WORDS)
def test_yaml_comes_back_as_the_same_recipe(tmp_path: Path, words: list[str]) -> None:
    recipe = load(*words)
    assert load_recipe(write(tmp_path / "stored.yaml", to_yaml(recipe)), []) == recipe


def test_auto_is_resolved_once_and_dp_stays() -> None:
    recipe = resolve_auto(load("mesh.dp=auto", "train.steps=7"))
    assert (recipe.optimizer.decay_steps, recipe.mesh.dp) == (7, "auto")
    autos = [key for key, value in flatten(recipe).items() if value == "auto"]
    assert autos == ["mesh.dp"]
    assert resolve_auto(recipe) == recipe
    assert resolve_auto(load("optimizer.decay_steps=3")).optimizer.decay_steps == 3


def test_flatten_gives_every_leaf_its_key() -> None:
    leaves = flatten(load())
    assert leaves["tokenizer.dct.coefficients"] == 8 and leaves["optimizer.betas"] == (0.9, 0.95)
    assert leaves["data.streams"] == [{"path": "latents", "weight": 1.0}] and leaves["text.hf"] is None


def complete(tree: dict[str, Any]) -> bool:
    """A recipe that can be run, not a base of others."""
    return {"run", "data", "model"} <= tree.keys()


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(RECIPES)))
def test_committed_recipes_load(path: Path) -> None:
    tree = read_recipe_layers(path)
    if path.parent == RECIPES:
        assert complete(tree), "a recipe at the top can be run; bases live in models/ and data/"
        assert load_recipe(path, []).run
        assert f"cuboid train recipes/{path.name}" in path.read_text(), "the header states its command"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.trainable=['blocks.9.*']"], r"train.trainable: 'blocks.9.\*' matches no parameter.*blocks.0.ffn"),
        (["train.trainable=['*lora_A*']"], r"train.trainable: '\*lora_A\*' matches no parameter"),
        (["lora.rank=4", "lora.targets=['*.to_z']"], r"lora.targets: '\*.to_z' matches nothing of the model"),
        (
            ["lora.rank=4", "lora.targets=[patch_embedding]"],
            r"'patch_embedding' matches only patch_embedding, which is no",
        ),
        (["lora.rank=4", "lora.targets=['*.norm_q']"], r"only blocks.0.attn1.norm_q, which is no linear"),
        (["lora.rank=4", "lora.targets=[]"], r"lora.targets is empty, so lora.rank=4"),
        (["lora.alpha=8"], r"lora.alpha=8.0 without adapters: set lora.rank"),
        (["lora.rank=4", "lora.alpha=0"], r"lora.alpha=0.0 must be above 0"),
        (["lora.rank=-1"], r"lora.rank=-1 must be at least 0"),
    ],
)
def test_patterns_of_what_is_trained_are_checked(words: list[str], told: str) -> None:
    assert re.search(told, refused(*words))


def test_adapters_default_to_attention() -> None:
    recipe = load("lora.rank=4", "lora.alpha=8")
    assert recipe.lora.scale == 2 and load("lora.rank=4").lora.scale == 1
    assert [name for name in ("to_q", "to_k", "to_v", "to_out.0") if recipe.lora.adapts(f"blocks.1.attn2.{name}")] != []
    assert not recipe.lora.adapts("blocks.0.ffn.net.2") and not load().lora.adapts("blocks.0.attn1.to_q")
    assert load("lora.rank=4", "train.trainable=['*.lora_A.*', '*norm*']").train.trainable


def test_image_to_video_can_be_described_but_not_trained() -> None:
    """8 latent channels, a mask of 4 (the stride in time) and a condition of 8."""
    check_trained(load())
    recipe = load("model.in_channels=20")
    with pytest.raises(ValueError, match=r"can be sampled but not trained; set model\.in_channels=8"):
        check_trained(recipe)
    with pytest.raises(ValueError, match="can be sampled but not trained"):
        check_trained(load("model.image_dim=16", "model.added_kv_proj_dim=24"))
    assert "or model.in_channels=20 for image to video" in refused("model.in_channels=19")
