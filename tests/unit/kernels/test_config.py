"""Which kernel auto stands for, and what is refused, on machines that this one isn't."""

from dataclasses import replace
from pathlib import Path

import pytest

from framework.kernels.config import (
    AttentionConfig,
    AttentionNeeds,
    check_attention,
    fitting_flash,
    installed_flash,
    resolve_attention,
)

GPU = AttentionNeeds(dtype="bfloat16", head_dim=128, deterministic=False, has_gpu=True)
CPU = replace(GPU, has_gpu=False)


def resolved(needs: AttentionNeeds, flash: tuple[int, ...] = ()) -> str:
    return resolve_attention(AttentionConfig(), needs, flash).kernel


@pytest.mark.parametrize(
    ("needs", "flash", "kernel"),
    [
        (GPU, (2,), "flash"),
        (GPU, (), "cudnn"),
        (replace(GPU, deterministic=True), (4,), "flash"),
        (replace(GPU, deterministic=True), (), "aten"),
        (replace(GPU, dtype="float32"), (2, 3, 4), "aten"),
        (replace(GPU, dtype="float64"), (2, 3, 4), "reference"),
        (replace(GPU, head_dim=256), (), "aten"),
        (replace(GPU, head_dim=6), (2,), "reference"),
        (replace(GPU, head_dim=12, dtype="float32"), (2,), "aten"),
        (CPU, (2, 3, 4), "aten"),
        (replace(CPU, dtype="float64", head_dim=6, deterministic=True), (), "aten"),
    ],
)
def test_auto(needs: AttentionNeeds, flash: tuple[int, ...], kernel: str) -> None:
    assert resolved(needs, flash) == kernel
    check_attention(AttentionConfig(kernel), needs, flash)  # type: ignore[arg-type]
    check_attention(AttentionConfig(), needs, flash)


@pytest.mark.parametrize("name", ["flash", "cudnn", "aten", "reference"])
def test_a_resolved_name_stays(name: str) -> None:
    config = AttentionConfig(name)  # type: ignore[arg-type]
    assert resolve_attention(config, CPU, ()) == config


@pytest.mark.parametrize(
    ("name", "needs", "flash", "parts"),
    [
        ("flash", GPU, (), ["none of flash-attn, flash-attn-3, flash-attn-4", "pip install", "kernel=cudnn can"]),
        ("flash", CPU, (), ["needs a GPU, and none is visible", "pip install", "attention.kernel=aten can"]),
        ("flash", CPU, (2,), ["needs a GPU, and none is visible", "attention.kernel=aten can"]),
        ("cudnn", CPU, (2,), ["needs a GPU, and none is visible"]),
        ("cudnn", replace(GPU, deterministic=True), (), ["isn't deterministic", "train.deterministic", "=aten can"]),
        ("flash", replace(GPU, dtype="float32"), (2,), ["precision.parameters=float32", "=aten can"]),
        ("aten", replace(GPU, dtype="float64"), (2,), ["precision.parameters=float64", "=reference can"]),
        ("cudnn", replace(GPU, head_dim=192), (2,), ["attention_head_dim % 8 == 0 and at most 128", "192"]),
        ("flash", replace(GPU, head_dim=12), (2,), ["attention_head_dim % 8 == 0, and that is 12", "=reference can"]),
    ],
)
def test_refusals(name: str, needs: AttentionNeeds, flash: tuple[int, ...], parts: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        check_attention(AttentionConfig(name), needs, flash)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"attention.kernel={name}: ") and "\n" not in message and len(message) < 400
    assert [part for part in parts if part not in message] == []


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="'flashy' is unknown"):
        AttentionConfig("flashy")  # type: ignore[arg-type]


def test_flash_attn_is_found_by_its_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 alone makes a package flash_attn too, so that name says nothing. Nothing is imported: there is nothing."""
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert installed_flash() == ()
    for name, version in (("flash_attn_3", "3.0.0"), ("flash_attn_4", "4.0.0b36")):
        (tmp_path / f"{name}-{version}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    assert installed_flash() == (3, 4)


@pytest.mark.parametrize(
    ("capability", "installed", "deterministic", "chosen"),
    [
        ((9, 0), (2, 3, 4), False, 3),
        ((9, 0), (2, 4), True, 4),
        ((9, 0), (2,), False, 2),
        ((10, 0), (2, 3, 4), False, 4),
        ((8, 0), (2, 4), False, 2),
        ((12, 0), (2, 4), True, 2),
    ],
)
def test_the_fastest_flash_attn(
    capability: tuple[int, int], installed: tuple[int, ...], deterministic: bool, chosen: int
) -> None:
    assert fitting_flash(installed, capability, deterministic) == chosen


@pytest.mark.parametrize(
    ("capability", "installed", "deterministic"),
    [((8, 0), (4,), False), ((10, 0), (3,), False), ((12, 0), (4,), True), ((7, 5), (2, 3, 4), False)],
)
def test_a_gpu_that_no_installed_flash_attn_serves(
    capability: tuple[int, int], installed: tuple[int, ...], deterministic: bool
) -> None:
    needs = replace(GPU, capability=capability, deterministic=deterministic)
    assert fitting_flash(installed, capability, deterministic) is None
    assert resolved(needs, installed) == ("aten" if deterministic else "cudnn")
    with pytest.raises(ValueError, match=rf"compute capability {capability[0]}\.{capability[1]}; .* can"):
        check_attention(AttentionConfig("flash"), needs, installed)
