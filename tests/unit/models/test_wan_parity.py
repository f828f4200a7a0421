"""Our transformer against diffusers' WanTransformer3DModel, on random weights that diffusers saved and we read.

Output within 2e-6 and every parameter's gradient within 5e-6 (max |g - ref| / max |ref|), float32. The spread of the
random weights matters to the second: softmax ignores what all keys share, so the gradient of `to_k.bias` is a sum that
nearly cancels. With tables of 0.5 instead of 0.1 both libraries are 2.7e-5 from a float64 run and 8e-6 from each other.
"""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor
from wan_cases import BATCH, CASES, Case, randomise, worst

from framework.kernels.attention import build_attention
from framework.kernels.config import AttentionConfig
from framework.models.config import ModelConfig
from framework.models.dit import DiT
from framework.models.export import read_whole
from framework.models.patchify import frame_index, patchify_input, token_positions, unpatchify_output
from framework.models.weights import DiffusersSource


def _reference(
    case: Case, directory: Path, inputs: dict[str, Tensor], weight_of_output: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """diffusers' output and gradients; the weights it used are in `directory`."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**asdict(case.config))
    randomise(model, torch.Generator().manual_seed(1))
    model.save_pretrained(directory)
    output = model(**inputs, return_dict=False)[0]
    (output * weight_of_output).sum().backward()
    return output.detach(), {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("timesteps", ["equal", "unequal"])
@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient_are_those_of_diffusers(name: str, timesteps: str, tmp_path: Path) -> None:
    case = CASES[name]
    latent, patch_size = case.latent, case.config.patch_size
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    noisy = draw(BATCH, case.config.in_channels, latent.frames, latent.height, latent.width)
    text = draw(BATCH, case.text_length, case.config.text_dim)
    image = draw(BATCH, case.image_tokens, case.config.image_dim) if case.config.image_dim else None
    output_weight = draw(BATCH, case.config.out_channels, latent.frames, latent.height, latent.width)
    frames = latent.frames // patch_size[0]
    times = 1000 * torch.rand(BATCH, 1 if timesteps == "equal" else frames, generator=generator)
    times_bt = times.expand(BATCH, frames)

    inputs = {"hidden_states": noisy, "encoder_hidden_states": text}
    if timesteps == "equal":
        inputs["timestep"] = times_bt[:, 0]
    else:
        tokens_per_frame = latent.height // patch_size[1] * (latent.width // patch_size[2])
        inputs["timestep"] = repeat(times_bt, "b t -> b (t n)", n=tokens_per_frame)
    if image is not None:  # with positions, diffusers wants the two frames' tokens as two rows
        rows = 1 if case.config.pos_embed_seq_len is None else 2
        inputs["encoder_hidden_states_image"] = rearrange(image, "b (r n) d -> (b r) n d", r=rows)
    expected, expected_gradients = _reference(case, tmp_path, inputs, output_weight)

    source = DiffusersSource(str(tmp_path))
    assert source.config == case.config
    model = DiT(source.config, build_attention(AttentionConfig("aten")))
    model.load_state_dict({name: read_whole(source, name) for name in source.shapes()}, strict=True)
    positions = token_positions(BATCH, latent, patch_size, noisy.device)
    patches = model(
        patchify_input(noisy, patch_size), positions, frame_index(positions), times_bt, text, image_bnd=image
    )
    output = unpatchify_output(patches, latent, patch_size)
    (output * output_weight).sum().backward()

    assert worst(output, expected) <= 2e-6
    gradients = {name: value.grad for name, value in model.named_parameters()}
    assert gradients.keys() == expected_gradients.keys()
    errors = {key: worst(gradients[key], expected_gradients[key]) for key in gradients}
    assert {key: error for key, error in errors.items() if not error <= 5e-6} == {}
    print(f"{name} {timesteps}: output {worst(output, expected):.1e}, gradients {max(errors.values()):.1e}")


def test_weights_in_several_files_are_those_in_one(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(**asdict(CASES["tiny"].config))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    source = DiffusersSource(str(tmp_path))
    tensors = {name: read_whole(source, name) for name in source.shapes()}
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())


def test_the_configuration_is_diffusers_with_its_defaults() -> None:
    import inspect

    from diffusers import WanTransformer3DModel

    parameters = inspect.signature(WanTransformer3DModel.__init__).parameters.values()
    assert asdict(ModelConfig()) == {p.name: p.default for p in parameters if p.name != "self"}
