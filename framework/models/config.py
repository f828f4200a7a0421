"""The size and the variants of the transformer: the configuration of diffusers' `WanTransformer3DModel`.

Names, meanings and defaults are diffusers', so that its `config.json` is read as it is. The defaults are Wan 2.1's
14B text-to-video model. Source: diffusers 0.39, `models/transformers/transformer_wan.py`; Wan (arXiv 2503.20314).

The model's width is D = num_attention_heads * attention_head_dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final, Literal

from framework.parallel.zero.config import PrecisionConfig, ZeroConfig

# Names of the adapters' matrices below their linear's, PEFT's.
LORA_A: Final = "lora_A"
LORA_B: Final = "lora_B"
THETA: Final = 10000.0  # base of the rotary frequencies
ATTENTION_LINEARS: Final = ("*.attn?.to_q", "*.attn?.to_k", "*.attn?.to_v", "*.attn?.to_out.0")


@dataclass(frozen=True)
class ModelConfig:
    """One transformer.

    patch_size: latent frames, rows and columns that make one token. num_attention_heads, attention_head_dim: of self-
    and cross-attention. ffn_dim: width inside the feed-forward. num_layers: blocks. eps: of every norm. in_channels,
    out_channels: of the latent. Image-to-video has more in than out: the condition is concatenated. text_dim: width of
    the caption encoder. freq_dim: number of sinusoids of the timestep. cross_attn_norm: an affine LayerNorm before the
    cross-attention (all published Wan models). qk_norm: only `rms_norm_across_heads`, the one that exists; diffusers
    ignores the value and always does this. image_dim: width of the image encoder whose tokens are attended to besides
    the text (Wan 2.1 image-to-video). added_kv_proj_dim: input width of the projections of the image tokens; these
    arrive at width D, so it is D. pos_embed_seq_len: number of image tokens, if these get a learned position (first and
    last frame: 2 * 257). rope_max_seq_len: length of diffusers' table of rotary angles, per axis, in tokens. Here the
    angles are computed
        from the positions and a longer axis simply works. The number is kept as part of the interchange format:
        weights trained on a longer axis need a larger one before diffusers can run them at that length.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))  # YAML and JSON have lists only
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(
                f"patch_size must be three positive integers (frames, rows, columns), got {self.patch_size}"
            )
        self._check_positive()
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise ValueError(
                "rotary positions turn pairs of channels along three axes: attention_head_dim % 2 == 0 and "
                f"attention_head_dim >= 6, got {self.attention_head_dim}: use a multiple of 2, at best of 6"
            )
        if self.freq_dim % 2:
            raise ValueError(f"the timestep has a cosine for every sine: freq_dim % 2 == 0, got {self.freq_dim}")
        if self.qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm={self.qk_norm!r} does not exist: the only one is 'rms_norm_across_heads'")
        self._check_image()

    def _check_positive(self) -> None:
        for name in ("num_attention_heads", "in_channels", "out_channels", "text_dim", "freq_dim", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} >= 1, got {getattr(self, name)}")
        for name in ("num_layers", "rope_max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} >= 1, got {getattr(self, name)}")
        if not self.eps > 0:
            raise ValueError(f"eps > 0, got {self.eps}")

    def _check_image(self) -> None:
        if self.image_dim is None:
            for name in ("added_kv_proj_dim", "pos_embed_seq_len"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)} is for image tokens: set image_dim, or drop it")
            return
        if self.added_kv_proj_dim != self.width:
            raise ValueError(
                "image tokens arrive at the model's width: added_kv_proj_dim == num_attention_heads * "
                f"attention_head_dim, got {self.added_kv_proj_dim} and {self.num_attention_heads} * "
                f"{self.attention_head_dim} = {self.width}: set added_kv_proj_dim={self.width}"
            )
        if self.image_dim < 1 or (self.pos_embed_seq_len is not None and self.pos_embed_seq_len < 1):
            raise ValueError(
                f"image_dim >= 1 and pos_embed_seq_len >= 1, got {self.image_dim} and {self.pos_embed_seq_len}"
            )

    @property
    def width(self) -> int:
        """D: the channels of a token inside the model."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def in_patch_dim(self) -> int:
        """P: the numbers of a token's input patch."""
        return self.in_channels * math.prod(self.patch_size)

    @property
    def out_patch_dim(self) -> int:
        """P_out: the numbers of a token's predicted patch."""
        return self.out_channels * math.prod(self.patch_size)


def training_cost(model: ModelConfig, *, text: int) -> tuple[float, float]:
    """(a, b): training on a sample of S tokens takes a S^2 + b S FLOPs, forward and backward, beside what doesn't grow
    with S (`plan/flops.py` has the terms). Under an attention pattern the pairs that attend take the place of S^2.
    text: tokens of a caption.
    """
    width, layers = model.width, model.num_layers
    linears = 2 * width * (6 * width + 2 * model.ffn_dim) + 4 * width * text
    around = 2 * width * (model.in_patch_dim + model.out_patch_dim)
    return 3.0 * layers * 4 * width, 3.0 * (layers * linears + around)


@dataclass(frozen=True)
class ExecutionConfig:
    """How a step is computed, without a change of what is computed.

    recompute: what the backward computes again instead of keeping it from the forward: none of it; all of each block
    (Chen et al., arXiv 1604.06174), exchanges between ranks included; or all but self-attention and its exchanges, the
    dearest part of a long clip. recompute_blocks: how many blocks do so, evenly over the depth, null = all; the others
    keep everything. offload: what these blocks keep waits in the host's memory from the forward to the backward.
    chunk_tokens: norms, modulation and feed-forward run over so many of a rank's tokens at a time, and compute again in
    the backward what is wide; 0 = over all at once, and nothing again. loss_chunk_tokens: likewise head and loss, so
    that the prediction never exists whole. compile: torch.compile for each block.
    """

    recompute: Literal["none", "all", "keep_attention"] = "none"
    recompute_blocks: int | None = None
    offload: bool = False
    chunk_tokens: int = 0
    loss_chunk_tokens: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("chunk_tokens", "loss_chunk_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"execution.{name}={getattr(self, name)} must be at least 1, or 0 for all at once")
        if self.recompute_blocks is not None and self.recompute == "none":
            raise ValueError(
                f"execution.recompute_blocks={self.recompute_blocks} with execution.recompute=none: no block is "
                "recomputed; set execution.recompute=all or keep_attention, or drop execution.recompute_blocks"
            )
        if self.recompute_blocks is not None and self.recompute_blocks < 1:
            raise ValueError(
                f"execution.recompute_blocks={self.recompute_blocks} must be at least 1; for none of them set "
                "execution.recompute=none"
            )
        if self.offload and self.recompute == "none":
            raise ValueError(
                "execution.offload=true with execution.recompute=none: what waits on the host is what recomputed "
                "blocks keep, and none is recomputed; set execution.recompute=all or keep_attention"
            )

    def recomputes(self, index: int, num_layers: int) -> bool:
        """Whether the block of this index is recomputed: k of n blocks are, where k i / n passes an integer."""
        if self.recompute == "none":
            return False
        chosen = num_layers if self.recompute_blocks is None else self.recompute_blocks
        return (index + 1) * chosen // num_layers > index * chosen // num_layers


def check_execution(
    execution: ExecutionConfig, model: ModelConfig, *, zero: ZeroConfig, precision: PrecisionConfig
) -> None:
    """Raises ValueError where model or engine can't do what `execution` says."""
    if (execution.recompute_blocks or 0) > model.num_layers:
        raise ValueError(
            f"execution.recompute_blocks={execution.recompute_blocks} of {model.num_layers} blocks: set at most "
            f"{model.num_layers}, or null for all"
        )
    held = 2 * model.width * model.ffn_dim
    blocks = [f"blocks.{index}." for index in range(model.num_layers)]
    for key, size, units, linears in (
        ("chunk_tokens", execution.chunk_tokens, blocks, ("ffn.net.0.proj", "ffn.net.2")),
        ("loss_chunk_tokens", execution.loss_chunk_tokens, [""], ("proj_out",)),
    ):
        if size and zero.engine == "deepspeed" and zero.stage == 3 and zero.reuse_distance < held:
            raise ValueError(
                f"execution.{key}={size} with zero.reuse_distance={zero.reuse_distance}: DeepSpeed's stage 3 would "
                f"gather weights anew for every chunk; set zero.reuse_distance to at least {held}"
            )
        names = [(unit, f"{unit}{linear}.{end}") for unit in units for linear in linears for end in ("weight", "bias")]
        for unit, name in names if size else ():
            row, around = precision.of(name), precision.of(f"{unit}scale_shift_table")
            if row != around or row.compute != precision.default.compute:
                raise ValueError(
                    f"execution.{key}={size} with a row of its own for {name} in precision.table: what runs by chunks "
                    f"has the row of what is around it; drop the rule, or set execution.{key}=0"
                )


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions of clips longer than the weights were trained on; the laws are in models/rope.py.

    time: how the frequencies of the axis of frames are scaled; those of rows and columns never are. factor: length now
    / length trained. trained_frames: latent frames that the weights were trained on, which only riflex reads.
    """

    time: Literal["none", "interpolation", "ntk", "riflex"] = "none"
    factor: float = 1.0
    trained_frames: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rope.factor={self.factor} (length now / length trained) must be at least 1")
        if self.time == "none" and self.factor != 1:
            raise ValueError(f"rope.factor={self.factor} with rope.time=none: choose rope.time, or drop rope.factor")
        if self.time == "riflex" and self.trained_frames < 1:
            raise ValueError(
                f"rope.time=riflex needs rope.trained_frames, the latent frames that the weights were trained on "
                f"(21 of 81 frames at a stride of 4), not {self.trained_frames}"
            )
        if self.time != "riflex" and self.trained_frames:
            raise ValueError(
                f"rope.trained_frames={self.trained_frames} with rope.time={self.time}: only riflex reads it; drop it"
            )


NO_SCALING: Final = RopeConfig()


def axis_channels(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with frames, rows and columns."""
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


def covering_pair(channels: int, length: float) -> int | None:
    """The first pair, from 0, of an axis whose period is at least `length` positions; None where there is none."""
    periods = (2 * math.pi * THETA ** (2 * j / channels) for j in range(channels // 2))
    return next((j for j, period in enumerate(periods) if period >= length), None)


def check_rope(rope: RopeConfig, model: ModelConfig) -> None:
    """Raises ValueError where the heads have too few channels for the scaling."""
    channels = axis_channels(model.attention_head_dim)[0]
    trained = rope.trained_frames / model.patch_size[0]
    if (rope.time == "ntk" and channels < 4) or (rope.time == "riflex" and covering_pair(channels, trained) is None):
        raise ValueError(
            f"rope.time={rope.time}: the {channels} channels that model.attention_head_dim={model.attention_head_dim} "
            f"leaves for frames have no period to scale: set rope.time=interpolation"
        )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of linears, y = W x + b + (alpha / rank) B A x with A `rank in` and B `out rank` (LoRA, arXiv
    2106.09685).

    rank: 0 = no adapters. alpha: null takes the rank, a factor of 1. targets: shell patterns (* and ?) on the names of
    linears within the model, as in blocks.0.attn1.to_q; what else a pattern matches is left alone.
    """

    rank: int = 0
    alpha: float | None = None
    targets: list[str] = field(default_factory=lambda: list(ATTENTION_LINEARS))

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank} must be at least 0")
        if self.alpha is not None and not self.rank:
            raise ValueError(f"lora.alpha={self.alpha} without adapters: set lora.rank, or drop lora.alpha")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"lora.alpha={self.alpha} must be above 0")
        if self.rank and not self.targets:
            raise ValueError(
                f"lora.targets is empty, so lora.rank={self.rank} has nothing to adapt: name some, or drop it"
            )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        assert self.rank, "there are no adapters"
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def adapts(self, linear: str) -> bool:
        """Whether a linear of this name gets an adapter."""
        return self.rank > 0 and matches(linear, self.targets)


NO_ADAPTERS: Final = LoraConfig()


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches one of some shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's."""
    return name.split(".")[-2:-1] in ([LORA_A], [LORA_B])


def is_trained(name: str, lora: LoraConfig, patterns: Sequence[str]) -> bool:
    """Whether a parameter is trained: adapters and what matches `patterns`; without either, everything."""
    return is_adapter(name) or matches(name, patterns) or not (lora.rank or patterns)
