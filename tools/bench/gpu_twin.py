"""One rank of Wan 14B in a job of 8 or 64 GPUs, on one GPU: memory, speed without a network, and the ceiling.

    python tools/bench/gpu_twin.py [--world 8 64] [--cp 8 16] [--tokens 32k 75k 150k] [--engine fsdp2] [--json OUT]
    python tools/bench/gpu_twin.py --device cpu --model tiny --tokens tiny      # the machinery, anywhere

one_rank.py says what is real and what is a copy. Each cell runs in a process of its own, so that one that doesn't fit
ends nothing else. For each:

    peak        reserved by torch's allocator, GiB: what must fit
    TFLOP/s     model FLOPs of this rank (plan/flops.py) / median seconds of a step
    ceiling     the same FLOPs / seconds of the step's matmuls and attention calls alone, each timed in the same run at
                its own shape; recomputed ones count in the seconds, not in the FLOPs
    predicted   bytes that this rank would send, and seconds at the given bandwidths; in none of the numbers above
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from one_rank import Measured, Work, measure
from rates import AttentionShape, Rate, attention_rates, linear_rates

from framework.kernels.attention import build_attention
from framework.kernels.config import AttentionConfig
from framework.models.config import ExecutionConfig, ModelConfig
from framework.parallel.config import MeshShape
from framework.parallel.zero.config import PrecisionConfig, ZeroConfig
from framework.plan.flops import step_flops
from framework.plan.memory import SIZES
from framework.programs.build import this_device
from framework.recipe import Recipe, check_kernel, resolve_auto
from framework.shapes import LatentShape

GIB = 1 << 30
LINK_DOMAIN = 8  # GPUs between which Ulysses stays
TEXT = 512  # UMT5 tokens, padded, as Wan has them
# Of 16 x 8 x 8 latents: 81 frames of 480p, 81 of 720p, 161 of 720p.
LATENTS = {
    "32k": LatentShape(21, 60, 104),
    "75k": LatentShape(21, 90, 160),
    "150k": LatentShape(41, 90, 160),
    "tiny": LatentShape(3, 8, 12),
}
TINY = ModelConfig(
    num_attention_heads=8, attention_head_dim=8, ffn_dim=96, num_layers=2, text_dim=24, freq_dim=16, in_channels=4,
    out_channels=4,
)  # fmt: skip
MODELS = {"wan-14b": ModelConfig(), "tiny": TINY}


@dataclass(frozen=True)
class Cell:
    """One job: tokens as named in LATENTS, GPUs, context parallelism."""

    tokens: str
    world: int
    cp: int

    @property
    def shape(self) -> MeshShape:
        """Ulysses inside the link domain, ring across."""
        ulysses = min(self.cp, LINK_DOMAIN)
        return MeshShape(dp=self.world // self.cp, ring=self.cp // ulysses, ulysses=ulysses, tp=1)


@dataclass(frozen=True)
class Result:
    """A cell's numbers; error: why there are none."""

    cell: Cell
    kernel: str = ""
    measured: Measured | None = None
    flops: float = 0.0
    ceiling_seconds: float = 0.0
    rates: tuple[Rate, ...] = ()
    error: str = ""

    @property
    def seconds(self) -> float:
        assert self.measured is not None
        return statistics.median(self.measured.seconds)


def build_recipe(given: argparse.Namespace) -> Recipe:
    """What the job would run with."""
    recipe = Recipe(
        model=MODELS[given.model],
        zero=ZeroConfig(engine=given.engine, stage=3),
        precision=PrecisionConfig(parameters=given.dtype),
        attention=AttentionConfig(given.kernel),
        execution=ExecutionConfig(recompute=given.recompute, compile=given.compile),
    )
    check_kernel(recipe, num_gpus=int(given.device == "cuda"))
    return resolve_auto(recipe)


def ceiling(recipe: Recipe, cell: Cell, work: Work) -> tuple[float, tuple[Rate, ...]]:
    """Seconds of a step's matmuls and attention calls of this rank, and the rates."""
    model, shape, like = work.model, cell.shape, torch.empty(0, device=this_device(), dtype=compute_dtype(recipe))
    rows, width = -(-work.num_tokens // shape.cp), model.width
    linears = (
        (6, (rows, width, width)),  # self-attention's four, cross-attention's query and output
        (2, (work.text, width, width)),  # its key and value
        (1, (rows, width, model.ffn_dim)),
        (1, (rows, model.ffn_dim, width)),
    )
    ring_rows = -(-work.num_tokens // shape.ring)
    heads = -(-model.num_attention_heads // shape.ulysses)
    attentions = (
        (shape.ring, "self", AttentionShape(1, ring_rows, ring_rows, heads, model.attention_head_dim)),
        (1, "cross", AttentionShape(1, rows, work.text, model.num_attention_heads, model.attention_head_dim)),
    )
    policy = recipe.execution.recompute
    rates: list[Rate] = []
    seconds = 0.0
    for count, dims in linears:
        found = linear_rates(*dims, like)
        rates += found
        seconds += count * (sum(rate.seconds for rate in found) + (policy != "none") * found[0].seconds)
    kernel = build_attention(recipe.attention)
    for count, name, attention in attentions:
        pair = attention_rates(kernel, attention, like)
        rates += pair
        again = policy == "all" or (policy == "keep_attention" and name == "cross")
        seconds += count * (pair[0].seconds * (1 + again) + pair[1].seconds)
    return seconds * model.num_layers, tuple(rates)


def compute_dtype(recipe: Recipe) -> torch.dtype:
    found: torch.dtype = getattr(torch, recipe.precision.default.compute)
    return found


def run_cell(given: argparse.Namespace, cell: Cell) -> Result:
    """A cell, in this process."""
    recipe = build_recipe(given)
    work = Work(recipe.model, LATENTS[cell.tokens], TEXT if given.model == "wan-14b" else 16)
    try:
        measured = measure(recipe, cell.shape, work, num_steps=given.steps, warmup=given.warmup)
    except torch.OutOfMemoryError as error:
        return Result(cell, recipe.attention.kernel, error=f"out of memory: {str(error).split('. ')[0]}")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    seconds, rates = ceiling(recipe, cell, work)
    flops = step_flops(work.model, tokens=work.num_tokens, text=work.text).total / cell.cp
    return Result(cell, recipe.attention.kernel, measured, flops, seconds, rates)


def predicted(result: Result, given: argparse.Namespace) -> list[tuple[str, float, float]]:
    """(group, bytes, seconds) that a rank sends in a step. ZeRO's by its formula, (n-1)/n of the parameters: gathered
    for forward and backward, reduced once (arXiv 1910.02054, section 7.2).
    """
    assert result.measured is not None
    precision = PrecisionConfig(parameters=given.dtype).default
    world, sent = result.cell.world, dict(result.measured.sent)
    each = 2 * SIZES[precision.compute] + SIZES[precision.reduce]
    rows = []
    for name in ("ulysses", "ring"):
        if sent.get(name):
            bandwidth = given.link if name == "ulysses" else given.network
            rows.append((name, float(sent[name]), sent[name] / bandwidth / 1e9))
    zero = result.measured.num_parameters * each * (world - 1) / world
    bandwidth = given.link if world <= LINK_DOMAIN else given.network
    return [*rows, ("zero", zero, zero / bandwidth / 1e9)]


def print_table(results: Sequence[Result], given: argparse.Namespace) -> None:
    print(f"{'tokens':>7}{'GPUs':>6}{'cp':>4}  {'mesh':28}{'peak GiB':>9}{'s a step':>10}{'TFLOP/s':>9}{'ceiling':>9}")
    for result in results:
        cell = result.cell
        start = f"{cell.tokens:>7}{cell.world:>6}{cell.cp:>4}  {cell.shape!s:28}"
        if result.measured is None:
            print(f"{start}  {result.error}")
            continue
        reserved = result.measured.reserved
        peak = "-" if reserved is None else f"{reserved / GIB:.1f}"
        speeds = [result.flops / seconds / 1e12 for seconds in (result.seconds, result.ceiling_seconds)]
        share = result.ceiling_seconds / result.seconds
        print(f"{start}{peak:>9}{result.seconds:10.3f}{speeds[0]:9.2f}{speeds[1]:9.2f}  {share:.1%} of the ceiling")
    print(
        f"\npredicted, apart: what a rank sends, at {given.link:g} GB/s in the link domain and {given.network:g} beyond"
    )
    for result in results:
        if result.measured is not None:
            words = [f"{name} {num / 1e9:.3f} GB = {took:.3f} s" for name, num, took in predicted(result, given)]
            print(f"{result.cell.tokens:>7}{result.cell.world:>6}{result.cell.cp:>4}  {', '.join(words)}")


def from_json(text: str) -> Result:
    """What a cell's process printed."""
    fields: dict[str, Any] = json.loads(text)
    measured = fields["measured"]
    return Result(
        Cell(**fields["cell"]),
        fields["kernel"],
        None if measured is None else Measured(**measured),
        fields["flops"],
        fields["ceiling_seconds"],
        tuple(Rate(**rate) for rate in fields["rates"]),
        fields["error"],
    )


def run_apart(words: Sequence[str], cell: Cell) -> Result:
    """A cell in a process of its own, which prints one line of JSON last."""
    command = [sys.executable, __file__, *words, "--cell", cell.tokens, str(cell.world), str(cell.cp)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        return Result(cell, error=lines[-1])
    return from_json(done.stdout.splitlines()[-1])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", choices=list(MODELS), default="wan-14b")
    parser.add_argument("--tokens", nargs="+", choices=list(LATENTS), default=["32k", "75k", "150k"])
    parser.add_argument("--world", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--cp", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--engine", choices=["fsdp2", "deepspeed"], default="fsdp2")
    parser.add_argument("--recompute", choices=["none", "all", "keep_attention"], default="keep_attention")
    parser.add_argument("--kernel", choices=["auto", "flash", "cudnn", "aten", "reference"], default="auto")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--link", type=float, default=300.0, help="GB/s a rank sends inside the link domain")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s a rank sends between nodes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cell", nargs=3, metavar=("TOKENS", "WORLD", "CP"), help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = build_parser()
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")  # before anything has asked for a GPU
    elif not torch.cuda.is_available():
        parser.error("no GPU is visible: --device cpu --model tiny --tokens tiny tries the machinery")
    try:
        recipe = build_recipe(given)
    except ValueError as error:
        parser.error(str(error))
    if given.cell:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks
        result = run_cell(given, Cell(given.cell[0], int(given.cell[1]), int(given.cell[2])))
        print(json.dumps(asdict(result)))
        return
    cells = [
        Cell(tokens, world, cp) for world in given.world for tokens in given.tokens for cp in given.cp if not world % cp
    ]
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    print(
        f"{given.model} on one {name}, torch {torch.__version__}, {given.engine} stage 3, {given.dtype}, recompute "
        f"{given.recompute}, kernel {recipe.attention.kernel}, one sample a replica"
    )
    results = []
    for cell in cells:
        print(f"{cell.tokens} tokens, {cell.world} GPUs, cp {cell.cp} ...", file=sys.stderr, flush=True)
        results.append(run_apart(sys.argv[1:], cell))
    print_table(results, given)
    if given.json:
        options = {name: str(value) for name, value in vars(given).items()}
        rows = [asdict(r) | {"predicted": predicted(r, given) if r.measured else None} for r in results]
        given.json.write_text(json.dumps({"options": options, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
