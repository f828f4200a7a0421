"""A recipe for longer or larger clips, from one that trains: a list of changes, each with its reason.

With N tokens a sample before and N' after, in the buckets that are the longest in seconds (shorter ones stay, so that
what they teach isn't forgotten):

    frames       causal tokenizer: 1 + seconds * fps, else seconds * fps; refused where the stride can't give just that
    micro batch  m' = max(1, m N // N')
    mesh         `choose_mesh`: context parallelism until m' N' / cp' costs a rank no more than m N / cp did
    batch        constant tokens: B' = B N / N' (Movie Gen, arXiv 2410.13720, went from 1,536 to 512), or samples
    shift        fixed: k sqrt(N' / N) (SD3, arXiv 2403.03206, equation 23); `tokens` follows by itself
    rotary time  by latent frames after / trained, `RopeConfig`
    lr           lr sqrt(B' / B): Adam's noise goes by samples (arXiv 2205.10287)
    bridge       where the clip at least doubles, half of the steps at the old frame count and half the frame rate:
                 twice the seconds for the same tokens (Open-Sora-Plan 1.5, report)
"""

import copy
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from framework.data.config import BucketConfig, DataConfig
from framework.layers import Tree, assign, overlay
from framework.models.config import RopeConfig
from framework.plan.flops import step_flops
from framework.plan.scale_mesh import (
    NODE,
    ChooseMesh,
    Placement,
    choose_mesh,
    longest,
    rank_tokens,
    sample_tokens,
    seconds_of,
)
from framework.recipe import Recipe, bucket_tokens
from framework.shapes import ClipShape, latent_shape, token_shape, valid_frames
from framework.text.config import text_length
from framework.tokenizer.config import tokenizer_strides

RopeTime = Literal["none", "interpolation", "ntk", "riflex"]
RIFLEX_LIMIT: Final = 3.0  # published: 2 without training, 3 with; beyond it, pairs that it leaves alone repeat too
WARMUP: Final = 100
KEPT: Final = ("all", "keep_attention", "none")  # recompute, by what it keeps


@dataclass(frozen=True)
class ScaleRequest:
    """What is wanted. size: height and width, None leaves them. num_gpus: None takes those of the recipe's mesh.
    rope: None chooses by the factor.
    """

    seconds: float
    num_gpus: int | None = None
    size: tuple[int, int] | None = None
    batch: Literal["tokens", "samples"] = "tokens"
    rope: RopeTime | None = None


@dataclass(frozen=True)
class Change:
    """One key of the recipe: what it was, what it becomes, why."""

    key: str
    before: Any
    after: Any
    reason: str


@dataclass(frozen=True)
class Figures:
    """Of the longest bucket. tokens, petaflops (forward and backward): of a sample. attention: share of the FLOPs.
    samples: of a step, over all buckets. rank_tokens: of one forward on one rank.
    """

    clip: str
    seconds: float
    tokens: int
    petaflops: float
    attention: float
    samples: int
    rank_tokens: int


def frames_for(recipe: Recipe, bucket: BucketConfig, seconds: float) -> int:
    """The frames of a clip of so many seconds. Raises ValueError with the nearest durations that can be."""
    strides, patch = tokenizer_strides(recipe.tokenizer), recipe.model.patch_size
    assert bucket.fps is not None
    exact = seconds * bucket.fps + strides.causal

    def fits(frames: int) -> bool:
        try:
            token_shape(latent_shape(ClipShape(frames, bucket.height, bucket.width), strides), patch)
        except ValueError:
            return False
        return True

    bucket_tokens(recipe, recipe.data.buckets.index(bucket))  # its height and width fit
    near, step = valid_frames(max(1, math.floor(exact)), strides)[0], strides.time
    span = range(near - patch[0] * step, near + (patch[0] + 1) * step + 1, step)
    choices = [frames for frames in span if frames > 1 and fits(frames)]
    best = min(choices, key=lambda frames: abs(frames - exact))
    if abs(best - exact) < 1e-6:
        return best
    below = max((frames for frames in choices if frames < exact), default=choices[0])
    above = min(frames for frames in choices if frames > exact)
    said = [f"{(n - strides.causal) / bucket.fps:.6g} s ({n} frames)" for n in dict.fromkeys((below, above))]
    raise ValueError(
        f"{seconds:g} s at {bucket.fps:g} frames a second are {exact:g} frames, which the tokenizer's time stride "
        f"{step} can't give; the nearest are {' and '.join(said)}"
    )


def mean_tokens(recipe: Recipe) -> float:
    """Of a sample, over the buckets by their weights."""
    weights = [bucket.weight for bucket in recipe.data.buckets]
    tokens = [bucket_tokens(recipe, index).num_tokens for index in range(len(weights))]
    return sum(w * n for w, n in zip(weights, tokens, strict=True)) / sum(weights)


def figures_of(recipe: Recipe) -> Figures:
    """What a table says of a recipe."""
    index = max(longest(recipe), key=lambda i: bucket_tokens(recipe, i).num_tokens)
    bucket, tokens = recipe.data.buckets[index], sample_tokens(recipe)
    flops = step_flops(recipe.model, tokens=tokens, text=text_length(recipe.text))
    return Figures(
        bucket.name,
        seconds_of(bucket, tokenizer_strides(recipe.tokenizer)),
        tokens,
        flops.total / 1e15,
        flops.attention / flops.total,
        recipe.data.global_batch,
        rank_tokens(recipe),
    )


def changes_for(old: Recipe, request: ScaleRequest, *, choose: ChooseMesh = choose_mesh) -> list[Change]:
    """Everything that the wanted clips change. Raises ValueError where they can't be."""
    if not 0 < request.seconds < math.inf:
        raise ValueError(f"--seconds {request.seconds} must be above 0")
    changes, new = bucket_changes(old, request)
    if not changes:
        raise ValueError(f"the longest clips are {request.seconds:g} s long already, and nothing else is asked for")
    before, after = sample_tokens(old), sample_tokens(new)
    micro = max(1, old.data.micro_batch * before // after)
    new = replace(new, data=replace(new.data, micro_batch=micro))
    more = f"{before:,} -> {after:,} tokens a sample"
    changes.append(Change("data.micro_batch", old.data.micro_batch, micro, f"{more}: no more tokens in a forward"))
    new, resolved = unresolved(old, new)
    gpus = request.num_gpus or fixed_ranks(old)
    placement = choose(old, with_samples(old, new, request.batch), gpus)
    changes += placement_changes(old, new, placement, gpus)
    new = replace(new, mesh=placement.mesh)
    batch, why = batch_of(old, new, request.batch)
    changes.append(Change("data.global_batch", old.data.global_batch, batch, why))
    changes += shift_changes(old, math.sqrt(after / before))
    changes += rope_changes(old, new, request.rope)
    lr, warmup = old.optimizer.lr, old.optimizer.warmup
    ratio = batch / old.data.global_batch
    reason = f"lr * sqrt(batch ratio {ratio:.4g}), Adam's rule for as noisy a step"
    changes.append(Change("optimizer.lr", lr, float(f"{lr * math.sqrt(ratio):.4g}"), reason))
    changes.append(Change("optimizer.warmup", warmup, max(warmup, WARMUP), "the moments begin anew"))
    changes += resolved
    if old.run:
        changes.append(Change("init_from", old.init_from, old.run, "goes on from the weights of the run so far"))
        changes.append(Change("run", old.run, f"{old.run}-{request.seconds:g}s", "a run of its own"))
    return [change for change in changes if change.before != change.after]


def bucket_changes(old: Recipe, request: ScaleRequest) -> tuple[list[Change], Recipe]:
    """Frames and sizes of the buckets, and the recipe with them."""
    buckets, changes, grown = list(old.data.buckets), [], longest(old)
    sizes = {(bucket.height, bucket.width) for bucket in buckets}
    if request.size is not None and len(sizes) > 1:
        said = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise ValueError(
            f"--resolution gives one size, and the buckets have several ({said}): set theirs in the recipe"
        )
    for index, bucket in enumerate(buckets):
        if request.size is not None:
            for name, size in zip(("height", "width"), request.size, strict=True):
                reason = "--resolution"
                changes.append(Change(f"data.buckets.{index}.{name}", getattr(bucket, name), size, reason))
            buckets[index] = bucket = replace(bucket, height=request.size[0], width=request.size[1])
        if index in grown:
            here = replace(old, data=replace(old.data, buckets=buckets))
            frames = frames_for(here, bucket, request.seconds)
            reason = f"{request.seconds:g} s at {bucket.fps:g} frames a second"
            changes.append(Change(f"data.buckets.{index}.frames", bucket.frames, frames, reason))
            buckets[index] = replace(bucket, frames=frames)
    new = replace(old, data=replace(old.data, buckets=buckets))
    length = max(bucket_tokens(new, index).frames for index in grown)
    reason = "diffusers' table of rotary angles has to be as long as an axis"
    changes.append(
        Change("model.rope_max_seq_len", old.model.rope_max_seq_len, max(old.model.rope_max_seq_len, length), reason)
    )
    return [change for change in changes if change.before != change.after], new


def unresolved(old: Recipe, new: Recipe) -> tuple[Recipe, list[Change]]:
    """The new recipe with `auto` where a run's stored recipe says what it stood for there, and the changes."""
    decay, kernel = old.optimizer.decay_steps, old.attention.kernel
    changes = [
        Change("optimizer.decay_steps", decay, "auto", "counted the steps before: follows those of this recipe"),
        Change("attention.kernel", kernel, "auto", "what the run before had: chosen anew where this runs"),
    ]
    optimizer, attention = replace(new.optimizer, decay_steps="auto"), replace(new.attention, kernel="auto")
    return replace(new, optimizer=optimizer, attention=attention), changes


def fixed_ranks(recipe: Recipe) -> int | None:
    """The GPUs of the recipe's mesh, where it says how many."""
    mesh = recipe.mesh
    return None if mesh.dp == "auto" else mesh.dp * mesh.ring * mesh.ulysses * mesh.tp


def placement_changes(old: Recipe, new: Recipe, placement: Placement, gpus: int | None) -> list[Change]:
    """Degrees and recompute. gpus: that there are, None where the recipe leaves it open."""
    mesh, held = placement.mesh, rank_tokens(old)
    cp = mesh.ring * mesh.ulysses
    now = -(-new.data.micro_batch * sample_tokens(new) // cp)
    used = "" if gpus is None or mesh.dp == "auto" else f"{mesh.dp * cp * mesh.tp:,} of {gpus:,} GPUs, "
    reason = (
        f"{used}{cp * mesh.tp} a sample: {now:,} tokens in a forward of a rank, as against {held:,}; Ulysses within "
        f"{NODE} ranks, a ring across"
    )
    changes = [Change("mesh", asdict(old.mesh), asdict(mesh), reason)]
    changes += [
        Change(f"data.buckets.{index}.{name}", getattr(old.data.buckets[index], name), None, "the mesh's")
        for index in longest(old)
        for name in ("ring", "ulysses")
    ]
    if len(old.data.buckets) > len(longest(old)):
        reason = "the shorter buckets take as few ranks a sample as deal out evenly"
        changes.append(Change("data.degrees", old.data.degrees, "auto", reason))
    keeps_more = KEPT.index(placement.recompute) > KEPT.index(old.execution.recompute)
    room = "room to keep more" if keeps_more else "no room to keep as much"
    reason = f"{now:,} tokens a rank instead of {held:,} leave {room} for the backward"
    return [*changes, Change("execution.recompute", old.execution.recompute, placement.recompute, reason)]


def exact_batch(old: Recipe, new: Recipe, kept: Literal["tokens", "samples"]) -> float:
    """Samples for as many tokens a step as before, or as many samples."""
    return old.data.global_batch * (1 if kept == "samples" else mean_tokens(old) / mean_tokens(new))


def with_samples(old: Recipe, new: Recipe, kept: Literal["tokens", "samples"]) -> Recipe:
    """The new recipe with about its batch, before the mesh that it is rounded to is known."""
    rounds = new.data.rounds
    batch = max(1, int(exact_batch(old, new, kept)) // rounds) * rounds
    return replace(new, data=replace(new.data, global_batch=batch))


def batch_of(old: Recipe, new: Recipe, kept: Literal["tokens", "samples"]) -> tuple[int, str]:
    """Samples a step, and why: those with as many tokens, to the nearest multiple of dp and of rounds. Raises
    ValueError where that is no longer about as many.
    """
    dp, exact = 1 if new.mesh.dp == "auto" else new.mesh.dp, exact_batch(old, new, kept)
    unit, before = math.lcm(dp, old.data.rounds), old.data.global_batch
    if unit > 2 * max(1, exact):
        cp = new.mesh.ring * new.mesh.ulysses
        most = max(1, int(exact)) * cp * new.mesh.tp
        other = f", say --batch samples for {before:,}" if kept == "tokens" and unit <= before else ""
        raise ValueError(
            f"mesh.dp={dp:,} (of {dp * cp * new.mesh.tp:,} GPUs, {cp * new.mesh.tp} a sample) and data.rounds="
            f"{old.data.rounds} need {unit:,} samples a step, where --batch {kept} gives {exact:.4g}: take --gpus "
            f"{most:,} or fewer{other}, or begin with more context parallelism (mesh.ring, mesh.ulysses) or a larger "
            "data.global_batch"
        )
    if kept == "samples":
        return before, "--batch samples"
    return max(1, round(exact / unit)) * unit, f"as many tokens a step would be {exact:.4g}, to a multiple of {unit}"


def shift_changes(old: Recipe, root: float) -> list[Change]:
    """The timestep shift for the new token count. root: of tokens after / before."""
    changes, shift = [], old.flow.shift
    if shift.name == "fixed":
        assert shift.fixed is not None, "choose_alternatives"
        reason = f"noise hides less of a clip of more tokens: times sqrt(tokens after / before) = {root:.4g}"
        changes.append(Change("flow.shift.fixed.value", shift.fixed.value, round(shift.fixed.value * root, 4), reason))
    if old.sampler.shift is not None:
        changes.append(Change("sampler.shift", old.sampler.shift, round(old.sampler.shift * root, 4), "as in training"))
    return changes


def rope_changes(old: Recipe, new: Recipe, wanted: RopeTime | None) -> list[Change]:
    """The scaling of rotary time, on top of what the old weights were trained with."""
    trained, now = (
        max(bucket_tokens(recipe, index).frames for index in longest(recipe)) * recipe.model.patch_size[0]
        for recipe in (old, new)
    )
    grown, own = now / trained, old.rope
    factor = round(own.factor * grown, 4)
    if wanted == "none" or (wanted is None and grown <= 1):
        return []
    choice: RopeTime = wanted or (own.time if own.time != "none" else "riflex" if factor <= RIFLEX_LIMIT else "ntk")
    if own.time not in ("none", choice):
        raise ValueError(
            f"--rope {choice}: the weights were trained with rope.time={own.time}, and another scaling would move "
            f"every position: leave --rope out, or say --rope {own.time}"
        )
    if factor < 1:
        raise ValueError(f"--rope {choice}: the clips get shorter ({trained} -> {now} latent frames): say --rope none")
    why = {
        "none": "",
        "interpolation": "every position within those trained, at finer steps",
        "ntk": f"slow pairs stretched, fast ones kept; above {RIFLEX_LIMIT:g} times one pair, riflex', isn't enough",
        "riflex": f"the one pair that would repeat is stretched, which holds to {RIFLEX_LIMIT:g} times",
    }[choice]
    base = (own.trained_frames or trained) if choice == "riflex" else 0
    scaled = RopeConfig(choice, factor, base)
    return [Change("rope", asdict(own), asdict(scaled), f"{trained} -> {now} latent frames: {why}")]


def bridge_stages(old: Recipe, changes: list[Change]) -> list[Tree]:
    """The old shapes at half the frame rate, then the new ones; none where the clip doesn't become twice as long."""
    kept = {change.key: change for change in changes}
    grown = longest(old)
    frames = [kept.get(f"data.buckets.{index}.frames") for index in grown]
    causal = tokenizer_strides(old.tokenizer).causal
    if not all(each and each.after - causal >= 2 * (each.before - causal) for each in frames):
        return []
    half = copy.deepcopy(apply_to({}, [replace(c, after=c.before) for c in changes if c.key in BRIDGED]))
    buckets = [set_fields(bucket) for bucket in old.data.buckets]
    for index in grown:
        buckets[index]["fps"] /= 2
    half.setdefault("data", {})["buckets"] = buckets
    mesh = kept.get("mesh")
    if mesh is not None and mesh.after["dp"] != "auto":
        ranks, replica = math.prod(mesh.after.values()), math.prod(v for k, v in mesh.before.items() if k != "dp")
        half["mesh"] = mesh.before | {"dp": ranks // replica} if ranks % replica == 0 else mesh.after
    steps = max(1, old.train.steps // 2)
    return [
        {"name": "half-rate", "exit": {"steps": steps}, **half},
        {"name": "full-rate", "exit": {"steps": steps}},
    ]


def set_fields(bucket: BucketConfig) -> Tree:
    """A bucket's fields that differ from their defaults."""
    plain, given = asdict(BucketConfig(0, 0, 0)), asdict(bucket)
    return {name: value for name, value in given.items() if value != plain[name]}


# What the bridge has as it was: with the tokens of before, so with their batch, place and noise.
BRIDGED: Final = (
    "mesh",
    "rope",
    "data.micro_batch",
    "data.global_batch",
    "data.degrees",
    "execution.recompute",
    "flow.shift.fixed.value",
    "optimizer.lr",
)


def last_stage(tree: Tree) -> Tree:
    """The keys of a recipe with stages as they are in its last one, which the weights come out of; of one without, its
    own.
    """
    plain = copy.deepcopy(tree)
    stages = plain.pop("stages", [])
    if stages:
        overlay(plain, {key: value for key, value in stages[-1].items() if key not in ("name", "exit")}, top=True)
        leaving = stages[-1].get("exit", {})
        steps, samples = leaving.get("steps"), leaving.get("samples")
        if steps is None and samples is not None:
            steps = math.ceil(samples / plain.get("data", {}).get("global_batch", DataConfig.global_batch))
        if steps is not None:
            plain["train"] = plain.get("train", {}) | {"steps": steps}
    return plain


def apply_to(tree: Tree, changes: list[Change]) -> Tree:
    """Write changes into a tree of keys, in place."""
    for change in changes:
        assign(tree, change.key.split("."), change.after, change.key, top=True)
    return tree
