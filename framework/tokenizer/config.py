"""Which video tokenizer turns pixels into latents, and what is known of it without building it."""

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from framework.fingerprint import files_hash
from framework.shapes import Strides

WAN_CLASS = "AutoencoderKLWan"
WAN_WEIGHTS = "diffusion_pytorch_model*.safetensors*"  # one file, or several with an index


@dataclass(frozen=True)
class DctConfig:
    """The tokenizer without weights.

    coefficients: latent channels kept of the 768 of a 4x8x8 block (1..768). scale: what latents are divided by, in
    units of pixels of [-1, 1]; decay: how fast that scale falls with frequency (the law is in tokenizer/dct.py).
    """

    coefficients: int = 48
    scale: float = 0.5
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.coefficients <= 768:
            raise ValueError(f"tokenizer.dct.coefficients={self.coefficients}: a 4x8x8 block of 3 colours has 1 to 768")
        if self.scale <= 0:
            raise ValueError(f"tokenizer.dct.scale={self.scale} must be above 0")


@dataclass(frozen=True)
class WanConfig:
    """Wan's causal autoencoder (2.1: 4x8x8 and 16 channels; 2.2: 4x16x16 and 48), as diffusers saves it.

    path: its directory, or that of a pipeline with a folder vae/. dtype: what it computes in; latents are float32.
    """

    path: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class LatentsConfig:
    """A tokenizer of which only the latents are here: what planning and training on them need to know. The defaults
    are the numbers of Wan 2.1's.

    time, height, width: its strides. causal: whether the first frame stands alone. channels: of the latents. version:
    what their shards say the tokenizer is (the `tokenizer` of their manifest).
    """

    time: int = 4
    height: int = 8
    width: int = 8
    causal: bool = True
    channels: int = 16
    version: str = ""

    def __post_init__(self) -> None:
        for name in ("time", "height", "width", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"tokenizer.latents.{name}={getattr(self, name)} must be at least 1")

    @property
    def strides(self) -> Strides:
        return Strides(self.time, self.height, self.width, self.causal)


@dataclass(frozen=True)
class TokenizerConfig:
    """name chooses the alternative; only that one's fields may be set."""

    name: Literal["dct", "wan", "latents"] = "dct"
    dct: DctConfig | None = None
    wan: WanConfig | None = None
    latents: LatentsConfig | None = None


@dataclass(frozen=True)
class WanVae:
    """What the files of Wan's autoencoder say of it. directory: where they are. strides: its own. mean, std: of its
    latents, a number for each channel.
    """

    directory: Path
    strides: Strides
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def weights(self) -> list[Path]:
        """The files of weights, with their index where there are several."""
        return sorted(self.directory.glob(WAN_WEIGHTS))


def read_wan(config: WanConfig) -> WanVae:
    """Read config.json, as diffusers writes it. Raises ValueError with the path and the fix.

    Older files leave out the strides, which then are diffusers' defaults.
    """
    root = Path(config.path).expanduser()
    directory = root / "vae" if (root / "vae").is_dir() else root
    here, fix = f"tokenizer.wan.path={config.path!r}", f"set it to a directory of an {WAN_CLASS}, or with one in vae/"
    if not config.path or not root.is_dir():
        raise ValueError(f"{here} is no directory: {fix}, as diffusers' save_pretrained writes it")
    if not (directory / "config.json").is_file():
        raise ValueError(f"{here}: {directory / 'config.json'} is missing: {fix}")
    try:
        stored: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if (name := stored.get("_class_name")) != WAN_CLASS:
            raise ValueError(f"it is of the class {name}: {fix}")
        mean, std = (tuple(map(float, stored[key])) for key in ("latents_mean", "latents_std"))
        time, space = int(stored.get("scale_factor_temporal", 4)), int(stored.get("scale_factor_spatial", 8))
        if not len(mean) == len(std) == stored.get("z_dim", 16) or not min(std) > 0:
            raise ValueError("latents_mean and latents_std must have z_dim numbers each, the latter above 0")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{here}: {directory / 'config.json'} can't be used, {error!r}: {fix}") from None
    except ValueError as error:
        raise ValueError(f"{here}: {directory / 'config.json'} can't be used: {error}") from None
    vae = WanVae(directory, Strides(time=time, height=space, width=space, causal=True), mean, std)
    if not vae.weights:
        raise ValueError(f"{here}: {directory} has no {WAN_WEIGHTS}: {fix}, saved as safetensors")
    return vae


def tokenizer_strides(config: TokenizerConfig) -> Strides:
    """The strides, without building the tokenizer."""
    match config.name:
        case "dct":
            return Strides(time=4, height=8, width=8, causal=True)
        case "wan":
            return read_wan(config.wan or WanConfig()).strides
        case "latents":
            return (config.latents or LatentsConfig()).strides


def tokenizer_channels(config: TokenizerConfig) -> int:
    """The number of latent channels, without building the tokenizer."""
    match config.name:
        case "dct":
            return (config.dct or DctConfig()).coefficients
        case "wan":
            return len(read_wan(config.wan or WanConfig()).mean)
        case "latents":
            return (config.latents or LatentsConfig()).channels


def tokenizer_version(config: TokenizerConfig) -> str:
    """Name and hash of everything that changes the latents; shards of latents carry it, and training refuses
    another.
    """
    match config.name:
        case "dct":
            dct = config.dct or DctConfig()
            text = f"dct/1 {dct.coefficients} {dct.scale!r} {dct.decay!r}"
            return f"dct-{blake2b(text.encode(), digest_size=8).hexdigest()}"
        case "wan":
            wan = config.wan or WanConfig()
            vae = read_wan(wan)
            return f"wan-{files_hash([vae.directory / 'config.json', *vae.weights])}-{wan.dtype}"
        case "latents":
            return (config.latents or LatentsConfig()).version
