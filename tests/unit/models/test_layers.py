"""What the transformer promises beside parity: masks, dtypes, split tokens, parameters used where they are held."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from framework.kernels.attention import build_attention
from framework.kernels.config import AttentionConfig
from framework.models.config import ModelConfig
from framework.models.dit import DiT
from framework.models.initialise import init_tensor
from framework.models.patchify import frame_index, token_positions
from framework.models.rope import build_rotation, rotate
from framework.shapes import LatentShape

CONFIG = ModelConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    in_channels=5,
    out_channels=4,
    text_dim=10,
    freq_dim=16,
    ffn_dim=40,
)
IMAGE = replace(CONFIG, image_dim=14, added_kv_proj_dim=24, pos_embed_seq_len=6)
LATENT = LatentShape(3, 4, 6)
BATCH, TEXT = 2, 5


def build(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float64) -> DiT:
    model = DiT(config, build_attention(AttentionConfig("aten")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0.0, 0.3, generator=generator)
    return model.to(dtype)


def make_inputs(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    positions = token_positions(BATCH, LATENT, config.patch_size, torch.device("cpu"))
    inputs = {
        "patches_bsp": torch.randn(BATCH, positions.shape[1], config.in_patch_dim, generator=generator).to(dtype),
        "positions_bs3": positions,
        "frame_index_bs": frame_index(positions),
        "timesteps_bt": 1000 * torch.rand(BATCH, LATENT.frames, generator=generator, dtype=torch.float64),
        "text_bld": torch.randn(BATCH, TEXT, config.text_dim, generator=generator).to(dtype),
    }
    if config.image_dim is not None:
        inputs["image_bnd"] = torch.randn(BATCH, 6, config.image_dim, generator=generator).to(dtype)
    return inputs


def assert_near(ours: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


def test_masked_text_is_as_if_it_were_not_there() -> None:
    model, inputs = build(), make_inputs()
    short = model(**(inputs | {"text_bld": inputs["text_bld"][:, :3]}))
    mask = torch.arange(TEXT).expand(BATCH, -1) < 3
    assert_near(model(**inputs, text_mask_bl=mask), short)
    assert not torch.allclose(model(**inputs), short)


@pytest.mark.parametrize("kernel", ["aten", "reference"])
def test_a_sample_without_any_text_gives_numbers(kernel: Any) -> None:
    model, inputs = build(), make_inputs()
    for block in model.blocks:
        block.attn2.kernel = build_attention(AttentionConfig(kernel))
    mask = torch.tensor([[False] * TEXT, [True] * TEXT])
    output = model(**inputs, text_mask_bl=mask)
    output.sum().backward()
    assert output.isfinite().all() and all(value.grad.isfinite().all() for value in model.parameters())
    other_text = inputs["text_bld"].clone()
    other_text[0] += 1
    assert torch.equal(model(**(inputs | {"text_bld": other_text}), text_mask_bl=mask), output)
    assert_near(output[1], model(**inputs)[1])


def test_tokens_may_come_in_any_order() -> None:
    model, inputs = build(), make_inputs()
    order = torch.randperm(inputs["patches_bsp"].shape[1], generator=torch.Generator().manual_seed(2))
    moved = {name: inputs[name][:, order] for name in ("patches_bsp", "positions_bs3", "frame_index_bs")}
    assert_near(model(**(inputs | moved)), model(**inputs)[:, order])
    with_wrong_positions = inputs | {"positions_bs3": inputs["positions_bs3"][:, order]}
    assert not torch.allclose(model(**with_wrong_positions), model(**inputs))


def test_one_timestep_stands_for_equal_ones() -> None:
    model, inputs = build(), make_inputs()
    one = inputs["timesteps_bt"][:, :1]
    equal = model(**(inputs | {"timesteps_bt": one.expand(-1, LATENT.frames)}))
    assert_near(model(**(inputs | {"timesteps_bt": one})), equal)


def test_a_token_takes_the_time_of_its_own_frame_and_sample() -> None:
    model, inputs = build(), make_inputs()
    embedder = model.condition_embedder
    seen = []
    model.norm_out.register_forward_hook(lambda *_: torch.ones(BATCH, 18, CONFIG.width, dtype=torch.float64))
    model.proj_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**inputs)
    temb = embedder(inputs["timesteps_bt"], inputs["text_bld"], None, torch.float64)[0]
    for sample in range(BATCH):
        for token in range(18):
            frame = token // 6  # 2 x 3 tokens a frame
            shift, scale = model.scale_shift_table[0] + temb[sample, frame]
            assert_near(seen[0][sample, token], 1 + scale + shift)


def test_a_frame_without_a_timestep_is_refused() -> None:
    inputs = make_inputs()
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        build()(**(inputs | {"timesteps_bt": inputs["timesteps_bt"][:, :2]}))


class Dtypes(TorchDispatchMode):
    """The dtype of everything that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[torch.dtype, set[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                self.seen.setdefault(value.dtype, set()).add(str(func))
        return result


@pytest.mark.parametrize("kernel", ["aten", "reference"])
@pytest.mark.parametrize("config", [CONFIG, IMAGE], ids=["text", "image"])
def test_float64_is_float64_throughout(config: ModelConfig, kernel: Any) -> None:
    model, inputs = build(config), make_inputs(config)
    for block in model.blocks:
        block.attn1.kernel = block.attn2.kernel = build_attention(AttentionConfig(kernel))
    with Dtypes() as dtypes:
        model(**inputs, text_mask_bl=torch.arange(TEXT).expand(BATCH, -1) < 3).sum().backward()
    exact = {torch.float64, torch.complex128, torch.int64, torch.bool}
    assert {dtype: ops for dtype, ops in dtypes.seen.items() if dtype not in exact} == {}


def test_bf16_keeps_time_and_norms_in_float32() -> None:
    model, inputs = build(IMAGE, torch.bfloat16), make_inputs(IMAGE, torch.bfloat16)
    exact = build(IMAGE, torch.bfloat16).to(torch.float32)  # the same rounded weights
    inputs32 = make_inputs(IMAGE, torch.bfloat16)
    inputs32 = {name: x.to(torch.float32) if x.dtype == torch.bfloat16 else x for name, x in inputs32.items()}
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("norm1", "norm2", "norm3", "norm_out", "time_embedder", "time_proj")):
            module.register_forward_hook(lambda _, __, out, name=name: outputs.setdefault(name, out))
    output = model(**inputs)
    assert output.dtype == torch.bfloat16
    rounded = {name for name, out in outputs.items() if out.dtype == torch.bfloat16}
    assert rounded == {"blocks.0.norm2", "blocks.1.norm2"}, "which round what they return themselves"
    others = [out for name, out in outputs.items() if name not in rounded]
    assert len(others) == 2 * 2 + 1 + 2 + 2 and {x.dtype for x in others} == {torch.float32}
    precise = exact.condition_embedder(
        inputs32["timesteps_bt"], inputs32["text_bld"], inputs32["image_bnd"], torch.float32
    )
    assert torch.equal(outputs["condition_embedder.time_proj"], precise[1].flatten(2))
    assert_near(output.to(torch.float32), exact(**inputs32), 0.05)


@pytest.mark.parametrize(
    "config", [CONFIG, IMAGE, replace(CONFIG, cross_attn_norm=False)], ids=["text", "image", "plain"]
)
def test_it_builds_and_runs_on_meta(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = DiT(config, build_attention(AttentionConfig("aten")))
    assert list(model.buffers()) == [] and all(value.is_meta for value in model.parameters())
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in build(config).state_dict().items()
    }
    inputs = {name: value.to("meta") for name, value in make_inputs(config, torch.float32).items()}
    assert model(**inputs).shape == (BATCH, 18, 16)


def test_parameters_are_used_only_while_their_module_runs() -> None:
    """As under ZeRO-3: outside of its module's forward a parameter is empty."""
    model, inputs = build(IMAGE), make_inputs(IMAGE)
    expected = model(**inputs)
    stored = {value: value.data for value in model.parameters()}

    def gather(module: nn.Module, _: object) -> None:
        for value in module.parameters(recurse=False):
            value.data = stored[value]

    def release(module: nn.Module, *_: object) -> None:
        for value in module.parameters(recurse=False):
            value.data = torch.empty(0, dtype=value.dtype)

    for module in model.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    with torch.no_grad():
        assert torch.equal(model(**inputs), expected)


def test_rotation_is_exact_at_large_positions_and_sees_differences_only() -> None:
    positions = torch.tensor([[[100_000, 7, 0], [100_003, 7, 90_001]]])
    rotation = build_rotation(positions, 16, torch.float32)[0, :, 0]  # 8 pairs: 4 of frames, 2 of rows, 2 of columns
    for token in range(2):
        for pair, (axis, exponent) in enumerate(
            [(0, 0), (0, 1 / 4), (0, 2 / 4), (0, 3 / 4), (1, 0), (1, 1 / 2), (2, 0), (2, 1 / 2)]
        ):
            angle = int(positions[0, token, axis]) / 10000.0**exponent
            assert abs(complex(rotation[token, pair]) - complex(math.cos(angle), math.sin(angle))) < 1e-7
    q_bshd, k_bshd = torch.randn(2, 1, 2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    products = []
    for offset in ([0, 0, 0], [40, 3, 9]):
        turn = build_rotation(positions % 1000 + torch.tensor(offset), 16, torch.float64)
        products.append((rotate(q_bshd, turn)[:, 0] * rotate(k_bshd, turn)[:, 1]).sum(-1))
    assert_near(products[1], products[0], 1e-11)


def test_image_tokens_are_given_exactly_when_the_model_has_them() -> None:
    image = make_inputs(IMAGE)["image_bnd"]
    with pytest.raises(ValueError, match="got image tokens for a model without image_dim"):
        build()(**make_inputs(), image_bnd=image)
    with pytest.raises(ValueError, match="got no image tokens for a model with image_dim"):
        build(IMAGE)(**(make_inputs(IMAGE) | {"image_bnd": None}))


def test_initial_values_follow_the_table() -> None:
    config = replace(IMAGE, num_attention_heads=8, attention_head_dim=64, added_kv_proj_dim=512, num_layers=1)
    with torch.device("meta"):
        shapes = {
            name: tuple(value.shape)
            for name, value in DiT(config, build_attention(AttentionConfig("aten"))).named_parameters()
        }
    draw = lambda name: init_tensor(name, shapes[name], torch.Generator().manual_seed(3), config)  # noqa: E731
    values = {name: draw(name) for name in shapes}
    assert {
        name for name, value in values.items() if value.shape != shapes[name] or value.dtype != torch.float32
    } == set()
    assert (values["proj_out.weight"] == 0).all()
    assert all((value == 0).all() for name, value in values.items() if name.endswith((".bias", ".pos_embed")))
    norms = [name for name in values if "norm" in name and name.endswith(".weight")]
    assert len(norms) == 8 and all((values[name] == 1).all() for name in norms)
    assert abs(values["blocks.0.scale_shift_table"].std() * 512**0.5 - 1) < 0.05
    assert abs(values["condition_embedder.time_embedder.linear_2.weight"].std() / 0.02 - 1) < 0.01
    for name, fans in {
        "patch_embedding.weight": 5 * 4 + 512,
        "blocks.0.ffn.net.0.proj.weight": 512 + 40,
        "condition_embedder.time_proj.weight": 512 + 6 * 512,
    }.items():
        bound = math.sqrt(6 / fans)
        assert 0.99 * bound < values[name].abs().max() <= bound
        assert abs(values[name].std() / (bound / 3**0.5) - 1) < 0.02
    assert torch.equal(values["blocks.0.attn1.to_q.weight"], draw("blocks.0.attn1.to_q.weight"))
    with pytest.raises(ValueError, match=r"blocks\.0\.gamma"):
        init_tensor("blocks.0.gamma", (4,), torch.Generator(), config)
