"""Our adapters against PEFT's on diffusers' WanTransformer3DModel, by files that one writes and the other reads."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from wan_cases import BATCH, CASES, randomise, worst

from framework.kernels.attention import build_attention
from framework.kernels.config import AttentionConfig
from framework.models.adapters import (
    ADAPTER_FILE,
    adapters_of,
    add_adapters,
    file_metadata,
    file_name,
    merged,
)
from framework.models.config import LoraConfig, is_adapter
from framework.models.dit import DiT
from framework.models.patchify import frame_index, patchify_input, token_positions, unpatchify_output

# Every kind of linear: in attention, feed-forward, embedders (computed in float32) and head.
TARGETS = [
    *LoraConfig().targets,
    *("*.ffn.net.0.proj", "*.ffn.net.2", "*.add_k_proj", "*.text_embedder.linear_?", "*.time_embedder.linear_1"),
    *("*.time_proj", "proj_out"),
]


def randomise_adapters(model: torch.nn.Module) -> None:
    """B away from zero."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if is_adapter(name):
                value.normal_(0.0, 0.3, generator=generator)


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("name", ["tiny", "image"])
def test_output_and_every_gradient_are_pefts(name: str, alpha: float | None, tmp_path: Path) -> None:
    """Written here, read by diffusers, which finds rank and alpha in the metadata; the base is frozen in both."""
    from diffusers import WanPipeline, WanTransformer3DModel

    case = CASES[name]
    targets = [t for t in TARGETS if case.config.image_dim or "add_k" not in t]
    lora = LoraConfig(rank=4, alpha=alpha, targets=targets)
    model = DiT(case.config, build_attention(AttentionConfig("aten")))
    randomise(model, torch.Generator().manual_seed(1))
    base = {key: value.detach().clone() for key, value in model.named_parameters()}
    add_adapters(model, lora)
    randomise_adapters(model)
    ours = dict(model.named_parameters())
    assert {key: value for key, value in ours.items() if not is_adapter(key)}.keys() == base.keys()
    file = {file_name(key): value.detach().clone() for key, value in ours.items() if is_adapter(key)}
    save_file(file, tmp_path / ADAPTER_FILE, metadata=file_metadata(lora, ours))

    reference = WanTransformer3DModel(**vars(case.config))
    reference.load_state_dict(base)
    state, metadata = WanPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    WanPipeline.load_lora_into_transformer(state, reference, metadata=metadata)
    loaded = reference.peft_config["default_0"]
    assert (loaded.r, loaded.lora_alpha) == (4, alpha or 4)

    latent, generator = case.latent, torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    noisy = draw(BATCH, case.config.in_channels, latent.frames, latent.height, latent.width)
    text = draw(BATCH, case.text_length, case.config.text_dim)
    image = draw(BATCH, case.image_tokens, case.config.image_dim) if case.config.image_dim else None
    weight = draw(BATCH, case.config.out_channels, latent.frames, latent.height, latent.width)
    times = 1000 * torch.rand(BATCH, 1, generator=generator)
    inputs = {"hidden_states": noisy, "encoder_hidden_states": text, "timestep": times[:, 0]}
    inputs |= {} if image is None else {"encoder_hidden_states_image": image}
    expected = reference(**inputs, return_dict=False)[0]
    (expected * weight).sum().backward()

    def run(model: DiT) -> Tensor:
        positions = token_positions(BATCH, latent, case.config.patch_size, noisy.device)
        patches, frames = patchify_input(noisy, case.config.patch_size), frame_index(positions)
        prediction = model(patches, positions, frames, times, text, image_bnd=image)
        return unpatchify_output(prediction, latent, case.config.patch_size)

    output = run(model)
    (output * weight).sum().backward()
    assert worst(output, expected) <= 2e-6
    theirs = {
        key.removesuffix(".default_0.weight") + ".weight": value.grad
        for key, value in reference.named_parameters()
        if "lora" in key
    }
    assert theirs.keys() == {key for key in ours if is_adapter(key)}
    errors = {key: worst(ours[key].grad, gradient) for key, gradient in theirs.items()}
    assert {key: error for key, error in errors.items() if not error <= 5e-6} == {}

    # Merged into the base, it is the same model without adapters.
    pairs = adapters_of(ours)
    assert len(pairs) == len(file) / 2
    for key, (a, b) in pairs.items():
        base[key] = merged(base[key], ours[a].detach(), ours[b].detach(), lora.scale)
    plain = DiT(case.config, build_attention(AttentionConfig("aten")))
    plain.load_state_dict(base)
    assert worst(run(plain), expected) <= 5e-6


def test_the_metadata_is_what_diffusers_writes(tmp_path: Path) -> None:
    """Keys that diffusers itself writes for an adapter of PEFT, with the same values."""
    import json

    from diffusers import WanPipeline, WanTransformer3DModel
    from peft import LoraConfig as PeftConfig
    from peft.utils import get_peft_model_state_dict

    case, lora = CASES["tiny"], LoraConfig(rank=4, alpha=6.0)
    reference = WanTransformer3DModel(**vars(case.config))
    reference.add_adapter(PeftConfig(r=4, lora_alpha=6, target_modules=r".*attn\d\.(to_[qkv]|to_out\.0)"))
    config = reference.peft_config["default"].to_dict() | {"target_modules": []}
    layers = get_peft_model_state_dict(reference)
    WanPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=config)
    model = DiT(case.config, build_attention(AttentionConfig("aten")))
    add_adapters(model, lora)
    names = [name for name, _ in model.named_parameters()]
    with safe_open(tmp_path / ADAPTER_FILE, framework="pt") as stored:
        assert set(stored.keys()) == {file_name(name) for name in names if is_adapter(name)}
        theirs = stored.metadata()
    ours = file_metadata(lora, names)
    assert ours.keys() == theirs.keys()
    mine, other = (json.loads(each["lora_adapter_metadata"]) for each in (ours, theirs))
    ignored = "transformer.target_modules"
    assert {key: other[key] for key in mine if key != ignored} == {k: v for k, v in mine.items() if k != ignored}
    assert mine[ignored][:2] == ["blocks.0.attn1.to_k", "blocks.0.attn1.to_out.0"] and len(mine[ignored]) == 16


def test_new_adapters_change_nothing() -> None:
    """B is zero; A is uniform of 1 / sqrt(fan in), each from its own name."""
    from framework.models.initialise import init_tensor

    config = replace(CASES["tiny"].config, num_layers=1)
    draw = lambda name, *shape: init_tensor(name, shape, torch.Generator().manual_seed(3), config)  # noqa: E731
    assert not draw("blocks.0.attn1.to_q.lora_B.weight", 24, 8).any()
    a = draw("blocks.0.attn1.to_q.lora_A.weight", 64, 400)
    expected = torch.nn.init.kaiming_uniform_(
        torch.empty(64, 400), a=5**0.5, generator=torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(a, expected)
