"""Predicted seconds against numbers worked out by hand, a ring's timeline played step by step, and the ledgers' bytes.

The tiny model: 2 tokens of width 24 in 2 heads of 12, 2 blocks, feed-forward 32; 16 text tokens of width 256; patches
of 32 numbers; 32 sinusoids.
"""

import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from described import machine
from tiny import write_recipe

from framework.parallel.config import MeshShape
from framework.plan.hardware import Attention, Hardware, load_hardware
from framework.plan.links import Place, place_of, seconds
from framework.plan.sent import engine_sent, own_sent, weights_of
from framework.plan.time import StepTime, ring_exchange, step_time, zero_calls
from framework.plan.traffic import MicroShape, own_ledger
from framework.plan.work import block_kernels
from framework.plan.zero_traffic import engine_traffic
from framework.recipe import Recipe, load_recipe

WAN = Path(__file__).parents[3] / "recipes" / "wan2.1-14b.yaml"

MICRO = MicroShape(0, 1, text=16)


def recipe_of(folder: Path, *words: str) -> Recipe:
    return load_recipe(write_recipe(folder, folder / "absent", words), [])


def on(shape: MeshShape) -> list[str]:
    return [f"mesh.{axis}={getattr(shape, axis)}" for axis in ("dp", "ring", "ulysses", "tp")]


def predicted(folder: Path, shape: MeshShape, hardware: Hardware, *words: str) -> StepTime:
    return step_time(recipe_of(folder, *on(shape), *words), shape, hardware, [MICRO])


def test_linears_and_attention_by_hand(tmp_path: Path) -> None:
    found = predicted(tmp_path, MeshShape(1, 1, 1, 1), machine())
    block = 2 * 2 * 24 * (6 * 24 + 2 * 32) + 2 * 16 * 24 * 2 * 24
    around = 2 * 2 * 24 * (32 + 32) + 2 * 16 * 24 * (256 + 24) + 2 * 24 * (32 + 7 * 24)
    assert (block, around) == (56_832, 230_784)
    assert found.linears == pytest.approx(3 * (2 * 56_832 + 230_784) / 1e6)  # 1.03 s
    forward = 2 * (4 * 2 * 2 * 24 + 4 * 2 * 16 * 24)
    assert forward == 6912
    assert found.attention == pytest.approx(6912 / 1e6 + 2.5 * 6912 / 0.5e6)
    assert found.total == pytest.approx(found.linears + found.attention)
    # MFU counts the backward of attention twice, not 2.5 times.
    assert found.mfu == pytest.approx(3 * (2 * 56_832 + 230_784 + 6912) / (found.total * 2e6))


def test_elementwise_operations_by_hand(tmp_path: Path) -> None:
    """A block, a token and channel, in bytes: three norms 8 each, two modulations 8, two gates 12, a sum 12, norms and
    rotations of q and k 40: 116. Feed-forward 2 x 32 x 8, text 16 x 24 x 8. Around: 2 tokens x (32 + 2 x 24) x 8.
    """
    block = 116 * 2 * 24 + 2 * 32 * 8 + 16 * 24 * 8
    forward = 2 * block + 2 * (32 + 48) * 8
    assert (block, forward) == (9152, 19_584)
    found = predicted(tmp_path, MeshShape(1, 1, 1, 1), machine(device__bandwidth=3 * 19_584))
    assert found.elementwise == pytest.approx(1.0)


def test_the_update_by_hand(tmp_path: Path) -> None:
    """An element of a rank's part: norm 4, clipping 8, AdamW 28, cast 8, clearing 4, average 12 = 64 bytes; of the
    whole gradient 16. Offloaded the first are the host's, and 4 + 4 cross.
    """
    shape, elements = MeshShape(2, 1, 1, 1), weights_of(recipe_of(tmp_path), 1).elements
    found = predicted(tmp_path, shape, machine(device__update=elements)).optimizer
    assert found == pytest.approx(64 / 2 + 16)
    host = {"device__host_memory": elements / 2, "device__host_bandwidth": elements / 4}
    found = predicted(tmp_path, shape, machine(**host), "zero.offload=optimizer").optimizer
    assert found == pytest.approx(2 * 64 / 2 + 4 * 8 / 2)


def test_frozen_weights_take_no_gradient(tmp_path: Path) -> None:
    """Their linears' backward is that of what goes in: 2 of 3 parts, and the share that is trained of the third."""
    shape = MeshShape(1, 1, 1, 1)
    recipe = recipe_of(tmp_path, "lora.rank=1")
    weights = weights_of(recipe, 1)
    found = step_time(recipe, shape, machine(), [MICRO])
    trained = 2 * 2 * 4 * (24 + 24)  # 2 blocks, 2 attentions, 4 linears of 24 x 24
    assert (weights.trained, weights.elements) == (trained, weights_of(recipe_of(tmp_path), 1).elements + trained)
    assert found.linears == pytest.approx((2 * 56_832 + 230_784) / 1e6 * (2 + trained / weights.elements))


def test_recompute_repeats_the_blocks_forward_or_all_but_self_attention(tmp_path: Path) -> None:
    shape, hardware = MeshShape(1, 1, 1, 1), machine()
    keep, everything = (
        predicted(tmp_path, shape, hardware, f"execution.recompute={name}").recompute
        for name in ("keep_attention", "all")
    )
    assert everything == pytest.approx((2 * 56_832 + 6912) / 1e6)
    assert everything - keep == pytest.approx(2 * 4 * 2 * 2 * 24 / 1e6)


def test_a_ring_of_two_by_hand(tmp_path: Path) -> None:
    """A message is 2 tensors x 1 token x 24 x 4 bytes = 192 bytes, a second. A kernel sees 1 query and 1 key: 96 FLOPs,
    0.25 s forward, 0.5 s backward. A block: one message forward, keys and values and their gradient backward.
    """
    ring = {"network__inside__bandwidth__ring": 192, "network__overlap": 1.0}
    rates = {"device__attention__aten__forward": 384, "device__attention__aten__backward": 480}
    shape = MeshShape(1, 2, 1, 1)
    found = predicted(tmp_path, shape, machine(**ring, **rates)).ring
    assert found.total == pytest.approx(2 * 3.0)
    assert found.exposed == pytest.approx(2 * (0.75 + 0.5 + 1.0))
    half = predicted(tmp_path, shape, machine(**(ring | {"network__overlap": 0.5}), **rates)).ring
    assert half.exposed == pytest.approx(2 * (3.0 - 0.5 * (0.25 + 0.5)))


def played(r: int, kernel: float, back: float, message: float) -> float:
    """Seconds that a rank waits in a block's forward and backward, as ring.py orders what it does."""
    waited = sum(max(0.0, message - kernel) for _ in range(r - 1))
    on_the_way = 0  # gradients
    for step in range(r):
        messages = (step < r - 1) + on_the_way
        waited += max(0.0, messages * message - back)
        on_the_way = 1 if step >= 1 else 0
    return waited + message * on_the_way


@pytest.mark.parametrize(("r", "bandwidth"), product([2, 3, 4, 6], [20.0, 90.0, 150.0, 1000.0]))
def test_a_ring_hides_what_the_order_of_its_steps_lets_it(r: int, bandwidth: float) -> None:
    shape, hardware = MeshShape(1, r, 1, 1), machine(network__inside__bandwidth__ring=bandwidth)
    own = {
        ("ring", "ring"): (2 * 2 * (r - 1), 4.0 * (r - 1) * 30),
        ("ring", "ring_gradients"): (2 * (r - 1), 60.0 * (r - 1)),
    }
    found = ring_exchange(shape, hardware, own, 30.0 * r, Attention(100.0, 100.0))
    assert found.exposed == pytest.approx(2 * played(r, 0.3, 0.75, 30 / bandwidth), abs=1e-9)


def test_a_ring_that_no_backward_reaches_sends_its_forward_alone(tmp_path: Path) -> None:
    """Only the head is trained: one message of 192 bytes a block; a kernel of a second hides it."""
    rates = {"network__inside__bandwidth__ring": 192, "device__attention__aten__forward": 96}
    found = predicted(tmp_path, MeshShape(1, 2, 1, 1), machine(**rates), "train.trainable=[proj_out.*]").ring
    assert (found.total, found.exposed) == (pytest.approx(2.0), pytest.approx(0.0, abs=1e-9))


@pytest.mark.parametrize(("domain", "total"), [(1, 10.0), (2, 4.0)])
def test_ulysses_inside_a_domain_and_across_by_hand(tmp_path: Path, domain: int, total: float) -> None:
    """A block sends 3/2 + 1/2 of 96 bytes one way and the same the other, 384 in 4 collectives. Across: 192 bytes/s,
    0.5 s and one hop of 0.25 s each, 2 + 3 s a block. Inside: 384 bytes/s, 0.125 s and a hop of 0.125 s each, 1 + 1 s.
    """
    links = {"network__across__bandwidth__all_to_all": 192, "network__across__latency__all_to_all": 0.5}
    links |= {"network__across__hop__all_to_all": 0.25, "network__inside__bandwidth__all_to_all": 384}
    links |= {"network__inside__latency__all_to_all": 0.125, "network__inside__hop__all_to_all": 0.125}
    found = predicted(tmp_path, MeshShape(1, 1, 2, 1), machine(network__domain=domain, **links)).ulysses
    assert found.total == found.exposed == pytest.approx(total)


def test_where_groups_lie() -> None:
    """arange(128).view(dp, ring, ulysses, tp) in domains of 8."""
    assert place_of(8, 1, 128, 8) == Place(8, 8)  # tp or ulysses inside
    assert place_of(4, 2, 128, 8) == Place(4, 4)  # ulysses 4 over tp 2
    assert place_of(4, 8, 128, 8) == Place(4, 1)  # a ring across
    assert place_of(64, 2, 128, 8) == Place(64, 4)  # zero over tp 2: four of its ranks in each node
    assert place_of(6, 1, 48, 8) == Place(6, 2)  # ranks 6 to 11 are cut into 2 and 4
    assert place_of(4, 1, 4, 8) == Place(4, 4)


def test_a_ring_of_two_domains_leaves_each_by_all_its_ports() -> None:
    """16 ranks, 8 in a domain: 14 hops inside, 1 across; 8 ports of 10 bytes/s are faster than 50 inside, 4 aren't."""
    links = {"network__inside__bandwidth__default": 50, "network__across__bandwidth__default": 10}
    hops = {"network__inside__hop__default": 1.0, "network__across__hop__default": 100.0}
    network = machine(**links, **hops).network
    assert seconds(network, Place(16, 8), "all_gather", 1, 100) == pytest.approx(14 + 100 + 100 / 50)
    assert seconds(network, Place(8, 4), "all_gather", 1, 100) == pytest.approx(6 + 100 + 100 / 40)
    # Of 7 peers 4 are elsewhere; 4/7 of the bytes by a port of 10.
    assert seconds(network, Place(8, 4), "all_to_all", 1, 70) == pytest.approx(3 + 100 + 40 / 10)
    assert seconds(network, Place(1, 1), "all_gather", 1, 100) == 0


def test_fsdp2_hides_all_but_the_first_group(tmp_path: Path) -> None:
    """Of 3 groups (2 blocks, and what is around them) the first gathered has nothing before it, the last reduced none
    after it.
    """
    slow, shape = machine(network__inside__bandwidth__default=1e9), MeshShape(4, 1, 1, 1)
    found = predicted(tmp_path, shape, slow, "zero.engine=fsdp2", "zero.stage=3").zero
    assert found.exposed == pytest.approx(found.total / 3)
    engine = predicted(tmp_path, shape, slow, "zero.engine=deepspeed", "zero.stage=2").zero
    assert engine.exposed == engine.total > 0


CALLS = [
    ("deepspeed", 1, {"all_gather": 3 + 1, "reduce": 3 + 3}),
    ("deepspeed", 2, {"all_gather": 3 + 1, "reduce": 2 * (3 + 3)}),
    ("deepspeed", 3, {"all_gather": 60 + 2 * 2 * 9, "reduce_scatter": 2 * 3}),
    ("fsdp2", 2, {"all_gather": 3, "reduce_scatter": 2 * 3, "all_reduce": 0}),
    ("fsdp2", 3, {"all_gather": 2 * 2 * 3, "reduce_scatter": 2 * 3, "all_reduce": 0}),
]


@pytest.mark.parametrize(("engine", "stage", "calls"), CALLS)
def test_an_engines_collectives_by_hand(tmp_path: Path, engine: str, stage: int, calls: dict[str, int]) -> None:
    """Of 2 micro-batches on 4 ranks, one replica. 26,760 elements are 3 buckets, of which each of 3 borders between the
    ranks' parts cuts one; 2 blocks and the rest are 3 groups. Of 69 parameters 9 have more than 700 elements: two a
    block, of 24 x 32; and 5 around them, of 768, 768, 768, 3456 and 6144.
    """
    words = (f"zero.engine={engine}", f"zero.stage={stage}", "zero.bucket_size=10000", "zero.persistence=700")
    shape = MeshShape(4, 1, 1, 1)
    recipe = recipe_of(tmp_path, *on(shape), *words)
    weights = weights_of(recipe, 1)
    assert (weights.trained, weights.count) == (26_760, 69)
    assert zero_calls(recipe, shape, machine(device__kind="gpu"), weights, 2) == calls
    if (engine, stage) == ("deepspeed", 3):  # two of those that persist at a time
        calls = calls | {"all_gather": 30 + 36}
    assert zero_calls(recipe, shape, machine(), weights, 2) == calls
    assert not any(zero_calls(recipe, MeshShape(1, 1, 1, 4), machine(), weights, 2).values())


def test_a_reduction_to_one_rank_has_a_kind_of_its_own(tmp_path: Path) -> None:
    """4 ranks send 3/4 of 26,760 x 4 bytes, a second at 80,280 bytes/s, in 1 + 3 calls of 0.5 s and 3 hops of 0.25 s.
    In two domains of two a call has a hop in each, and one of 2 s between them.
    """
    own = {"bandwidth": 80_280, "latency": 0.5, "hop": 0.25}
    links = {f"network__inside__{name}__reduce": value for name, value in own.items()}
    words, shape = ("zero.stage=2",), MeshShape(4, 1, 1, 1)
    assert predicted(tmp_path, shape, machine(**links), *words).zero.total == pytest.approx(1 + 4 * (0.5 + 3 * 0.25))
    far = machine(**links, network__domain=2, network__across__hop__reduce=2)
    assert predicted(tmp_path, shape, far, *words).zero.total == pytest.approx(1 + 4 * (0.5 + 2 * 0.25 + 2))
    words = ("zero.engine=fsdp2", "zero.stage=2")
    assert predicted(tmp_path, shape, machine(**links), *words).zero.total == pytest.approx(0, abs=1e-6)


def test_ranks_wait_for_the_slowest_by_hand(tmp_path: Path) -> None:
    """A rank of dp=4 computes 3 (2 x 56,832 + 230,784) / 1e6 + 6912 / 1e6 + 2.5 x 6912 / 0.5e6 = 1.074816 s, as its
    samples are its own. DeepSpeed's stage 2 has 2 + 4 collectives, so 0.179136 s lie between two.
    """
    shape, computed = MeshShape(4, 1, 1, 1), 1.074816

    def skew(stretch: float) -> float:
        return predicted(tmp_path, shape, machine(network__skew=0.2, network__stretch=stretch)).skew

    assert skew(0.179136) == pytest.approx(0.2 * computed), "measured over as long a stretch"
    assert skew(0.044784) == pytest.approx(0.1 * computed), "a stretch four times as long: half the share"
    assert skew(9 * 0.179136) == pytest.approx(0.2 * computed), "a shorter one: no larger share"
    launch = machine(network__skew=0.2, network__stretch=1e3, device__launch=1e-2)
    # The host's time counts like the kernels': 3 x (2 x 50 + 36) + 3 x 69 launches.
    assert predicted(tmp_path, shape, launch).skew == pytest.approx(0.2 * (computed + 6.15))


def test_a_tp_group_waits_at_every_one_of_its_exchanges(tmp_path: Path) -> None:
    """2 blocks gather and scatter 3 times each in a forward and a backward, 24, and sum 4 norms, 16; 3 gradients of
    conditions and 17 of weights are summed: 60 at least, of which pure dp has none. All of what it computes is in
    stretches that are shorter than a 50th.
    """
    shape = MeshShape(1, 1, 1, 2)
    computed = predicted(tmp_path, shape, machine()).computing
    assert computed > 0.5
    short = machine(network__skew=0.2, network__stretch=computed / 50)
    found = predicted(tmp_path, shape, short)
    assert found.skew == pytest.approx(0.2 * computed)
    assert found.total == pytest.approx(1.2 * computed, rel=1e-6)
    assert found.parts()["skew"] == found.skew
    alone = predicted(tmp_path, MeshShape(2, 1, 1, 1), short)  # 2 + 2 collectives
    assert alone.skew == pytest.approx(0.2 * 1.074816 * (4 * computed / 50 / 1.074816) ** 0.5)


def test_nobody_waits_alone_or_where_no_skew_is_described(tmp_path: Path) -> None:
    drifting = machine(network__skew=0.2, network__stretch=1.0)
    assert predicted(tmp_path, MeshShape(1, 1, 1, 1), drifting).skew == 0
    for shape in (MeshShape(4, 1, 1, 1), MeshShape(1, 1, 1, 2)):
        assert predicted(tmp_path, shape, machine()).skew == 0
        assert predicted(tmp_path, shape, drifting).skew > 0


def test_a_gpus_host_runs_ahead_and_a_cpus_doesnt(tmp_path: Path) -> None:
    recipe, shape = recipe_of(tmp_path), MeshShape(1, 1, 1, 1)
    weights = weights_of(recipe, 1)
    assert block_kernels(recipe) == 50 and weights.count == 2 * 27 + 15
    launched = 3 * (2 * 50 + 36) + 3 * 69  # deepspeed, stage 2
    for kind in ("cpu", "gpu"):
        hardware = machine(device__kind=kind, device__launch=1e-2)
        found = step_time(recipe, shape, hardware, [MICRO])
        busy, host = found.computing + found.optimizer, launched * 1e-2
        assert found.total == pytest.approx(busy + host if kind == "cpu" else max(busy, host))


def test_ranks_that_share_cores_take_turns(tmp_path: Path) -> None:
    alone, crowded = (predicted(tmp_path, MeshShape(4, 1, 1, 1), machine(device__shared=cores)) for cores in (4, 2))
    assert crowded.total == pytest.approx(2 * alone.total)
    assert crowded.mfu == pytest.approx(alone.mfu / 2)


MESHES = [MeshShape(2, 1, 1, 1), MeshShape(1, 2, 1, 2), MeshShape(2, 2, 2, 1), MeshShape(3, 1, 2, 2)]
ENGINES = [
    ("zero.stage=1", "precision.parameters=bfloat16"),
    ("zero.stage=1", "execution.recompute=all"),
    ("zero.stage=2", "precision.parameters=bfloat16", "execution.recompute=keep_attention"),
    ("zero.stage=3", "zero.persistence=100", "zero.reuse_distance=0", "execution.recompute=all"),
    ("zero.stage=3", "zero.persistence=0"),
    ("zero.engine=fsdp2", "zero.stage=3"),
    ("zero.engine=fsdp2", "zero.stage=2", "zero.partition=2"),
    ("lora.rank=4", "zero.engine=fsdp2", "zero.stage=3"),
]


@pytest.mark.parametrize(("shape", "words"), product(MESHES, ENGINES))
def test_bytes_are_the_ledgers(tmp_path: Path, shape: MeshShape, words: tuple[str, ...]) -> None:
    """Exactly, in floating point: 1e-12 is rounding."""
    if "zero.partition=2" in words and shape.dp * shape.cp % 2:
        words = words[:-1]
    sizes = ("data.buckets=[{frames: 5, height: 48, width: 80}]", "model.num_attention_heads=6")  # 15 tokens; 3 = 2 + 1
    recipe = recipe_of(tmp_path, *on(shape), *sizes, *words)
    micros, weights = [MicroShape(0, 2, text=16), MicroShape(0, 1, text=16, timesteps=3)], weights_of(recipe, shape.tp)
    said, found = own_ledger(recipe, shape, 0, micros), own_sent(recipe, shape, micros, weights)
    assert {key: calls for key, (calls, _) in found.items()} == {key: calls for key, (calls, _) in said.items()}
    assert {k: sent for k, (_, sent) in found.items()} == pytest.approx(
        {k: float(sent) for k, (_, sent) in said.items()}, rel=1e-12
    )
    engine = {kind: float(sent) for kind, sent in engine_traffic(recipe, shape, 0, len(micros)).sent.items()}
    assert engine_sent(recipe, shape, len(micros), weights) == pytest.approx(engine, rel=1e-12)


@pytest.mark.alone
def test_a_search_can_ask_thousands_of_times(tmp_path: Path) -> None:
    """0.3 ms of processor time, the best of some; 40 layers cost what 2 do."""
    recipe, hardware = recipe_of(tmp_path, "model.num_layers=40", "mesh.ulysses=2"), load_hardware("h100")
    shape = MeshShape(16, 1, 2, 1)
    weights, best = weights_of(recipe, 1), 1.0
    for _ in range(20):
        begin = time.process_time()
        for _ in range(20):
            step_time(recipe, shape, hardware, [MICRO], weights=weights)
        best = min(best, (time.process_time() - begin) / 20)
    assert best < 0.3e-3


def test_a_missing_rate_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"device.matmul.bfloat16 isn't described"):
        predicted(tmp_path, MeshShape(1, 1, 1, 1), machine(), "precision.parameters=bfloat16")
    with pytest.raises(ValueError, match=r"device.attention.reference isn't described for made, only aten"):
        predicted(tmp_path, MeshShape(1, 1, 1, 1), machine(), "attention.kernel=reference")


def test_activations_on_their_way_to_the_host_cost_what_nothing_hides() -> None:
    """With a link to the host so slow that a forward hides next to nothing: bytes there, and bytes back."""
    words = ["execution.recompute=all", "data.micro_batch=1"]
    recipe = load_recipe(WAN, words)
    away = load_recipe(WAN, [*words, "execution.offload=true"])
    shape, micro = MeshShape(16, 1, 4, 2), MicroShape(0, 1, 512)
    h100 = load_hardware("h100")
    slow = replace(h100, device=replace(h100.device, host_bandwidth=1e9))
    here, there = (step_time(each, shape, slow, [micro]) for each in (recipe, away))
    # 40 blocks keep their input, 32,760 / 8 tokens of 5120 channels in two bytes.
    way = 40 * 32_760 / 8 * 5120 * 2 / 1e9
    hidden = there.computing * slow.network.overlap
    assert here.offload == 0 and there.offload == pytest.approx(2 * way - hidden, rel=1e-9)
    assert there.total == pytest.approx(here.total + there.offload)
    assert step_time(away, shape, h100, [micro]).offload == 0, "at PCIe's speed a forward hides it"
