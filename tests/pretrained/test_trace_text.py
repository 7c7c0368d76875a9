"""``trace_text``: names, directories, models and pipelines; texts, pairs, batches, chats, pictures and sounds."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hookattn
from hookattn import analyze
from hookattn.errors import InputError, ModelError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = "[UNK] [PAD] [CLS] [SEP] the cat sat on mat a dog ran . lay rug".split()
A, B = "the cat sat on the mat .", "the cat lay on a rug ."


def tokenizer(*, pairs: bool = False, pad: bool = True) -> Any:
    """Of words; ``pairs``: with BERT's separators, else texts follow each other without any."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special: dict[str, str] = {"unk_token": "[UNK]", **({"pad_token": "[PAD]"} if pad else {"eos_token": "."})}
    if pairs:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def decoder() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=len(WORDS), n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def encoder() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=len(WORDS)
    )
    return transformers.BertModel(config).eval()


def seq2seq() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        vocab_size=len(WORDS),
        decoder_start_token_id=1,
        eos_token_id=None,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.fixture
def directory(tmp_path: Path) -> str:
    encoder().save_pretrained(tmp_path)
    tokenizer(pairs=True).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_directory_a_model_and_a_pipeline_are_one(directory: str) -> None:
    own = transformers.AutoModel.from_pretrained(directory)
    tok = tokenizer(pairs=True)
    expected = hookattn.trace(own, dict(tok(A, return_tensors="pt")))
    pipe = transformers.pipeline("feature-extraction", model=own, tokenizer=tok)
    for found in (
        hookattn.trace_text(directory, A),
        hookattn.trace_text(Path(directory), [A]),
        hookattn.trace_text(own, A),  # it knows the name that it was loaded by
        hookattn.trace_text(own, A, tokenizer=tok),
        hookattn.trace_text(pipe, A),
    ):
        assert found.tokens == [["[CLS]", *A.split(), "[SEP]"]] and found.segments is None
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.weights, b.weights)
        assert not found.output.last_hidden_state.requires_grad


def test_options_go_to_the_trace_and_to_the_model(directory: str) -> None:
    found = hookattn.trace_text(
        directory, A, capture=("weights",), layers=[1], load={"attn_implementation": "eager", "dtype": torch.float64}
    )
    assert [c.site.layer for c in found] == [1] and not found[0].has("q")
    assert found[0].weights.dtype == torch.float64 and found[0].tap == "eager"
    with_graph = hookattn.trace_text(encoder(), A, tokenizer=tokenizer(), gradients=True)
    with_graph.output.last_hidden_state[..., 0].sum().backward()
    assert with_graph[0].grad("weights").abs().sum() > 0


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_pair_says_whose_each_token_is(kind: str) -> None:
    """Where separators stand between the two, and where nothing does."""
    model, tok = (encoder(), tokenizer(pairs=True)) if kind == "encoder" else (decoder(), tokenizer())
    found = hookattn.trace_text(model, A, pair=B, tokenizer=tok)
    first, second = [0] * len(A.split()), [1] * len(B.split())
    assert found.segments == [[0, *first, 0, *second, 1] if kind == "encoder" else [*first, *second]]
    part = torch.tensor(found.segments[0])
    own = analyze.between_segments(found)
    for row in own[own["from"].eq("B") & own["to"].eq("A")].itertuples():
        weights = found[row.call].weights[0, row.head].double()
        assert row.value == pytest.approx(float(weights[part == 1][:, part == 0].sum(1).mean()), abs=1e-6)


def test_segments_are_in_the_file_and_its_parts(tmp_path: Path) -> None:
    found = hookattn.trace_text(decoder(), [A, "a dog ."], pair=[B, "the cat sat ."], tokenizer=tokenizer())
    assert found.segments is not None and -1 in found.segments[1] and found.tokens is not None
    path = found.save(tmp_path / "a.safetensors")
    for other in (hookattn.load(path), found.select(layer=0), found[:1]):
        assert other.segments == found.segments
    streamed = hookattn.trace_text(decoder(), A, pair=B, tokenizer=tokenizer(), to=tmp_path / "b.safetensors")
    assert hookattn.load(tmp_path / "b.safetensors").segments == streamed.segments


def test_same_word_across_goes_by_what_the_trace_says() -> None:
    found = hookattn.trace_text(decoder(), "a dog", pair="the dog", tokenizer=tokenizer(), capture=("weights", "mask"))
    table = analyze.measure(found, [analyze.SameWord(across=True)])
    column = analyze.SameWord(across=True).key
    for row in table.itertuples():
        expected = float(found[row.call].weights[0, row.head, 3, 1])  # the second dog on the first
        assert table.loc[row.Index, column] == pytest.approx(expected, abs=1e-6)


def test_a_batch_is_padded_and_the_tokenizer_stays_as_it_was() -> None:
    tok, model = tokenizer(pad=False), decoder()
    found = hookattn.trace_text(model, [A, "a dog ."], tokenizer=tok)
    assert tok.pad_token is None
    alone = hookattn.trace_text(model, "a dog .", tokenizer=tok)
    for a, b in zip(found, alone, strict=True):
        assert torch.allclose(a.weights[1, :, :3, :3], b.weights[0], atol=1e-6)
        assert not a.weights[1, :, :3, 3:].any()


def test_a_generation_has_the_tokens_that_were_written() -> None:
    model, tok = decoder(), tokenizer()
    found = hookattn.trace_text(model, ["a dog", A], tokenizer=tok, generate=4)
    assert {c.step for c in found} == {0, 1, 2, 3} and found.tokens is not None
    written = model.generate(**tok(["a dog", A], return_tensors="pt", padding=True, padding_side="left"),
                             max_new_tokens=4, do_sample=False, pad_token_id=tok.pad_token_id)  # fmt: skip
    assert found.tokens == [tok.convert_ids_to_tokens(row) for row in written.tolist()]
    assert torch.equal(found.output, written)
    assert hookattn.trace_text(model, A, pair=B, tokenizer=tok, generate=2).segments == [[0] * 7 + [1] * 9]


def test_an_encoder_decoder_has_tokens_of_both() -> None:
    model, tok = seq2seq(), tokenizer()
    found = hookattn.trace_text(model, A, tokenizer=tok)
    assert found.stack_tokens == {"encoder": [A.split()], "decoder": [["[PAD]"]]} and found.notes
    found = hookattn.trace_text(model, A, tokenizer=tok, generate=3)
    assert found.tokens == [A.split()] and len(found.stack_tokens["decoder"][0]) == 4


@pytest.mark.parametrize("count", [1, 3])
def test_a_model_that_returns_only_what_it_wrote(count: int) -> None:
    """Whisper leaves the start tokens out of what it returns: each position would be named by the next one."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=len(WORDS), num_mel_bins=8, max_source_positions=50,
        max_target_positions=20, decoder_start_token_id=2, pad_token_id=1, bos_token_id=2, eos_token_id=3,
        begin_suppress_tokens=None,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    processor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    found = hookattn.trace_text(
        model, audio=np.zeros(8000, "float32"), processor=processor, tokenizer=tokenizer(), generate=count
    )
    tokens = found.stack_tokens["decoder"][0]
    assert tokens[0] == "[CLS]" and len(tokens) == 1 + count == 1 + max(c.step for c in found) + 1


def test_a_conversation_goes_through_its_template() -> None:
    tok = tokenizer()
    tok.chat_template = "{% for m in messages %}[CLS] {{ m['content'] }} [SEP] {% endfor %}[CLS]"
    found = hookattn.trace_text(decoder(), [{"role": "user", "content": "a dog ."}], tokenizer=tok)
    assert found.tokens == [["[CLS]", "a", "dog", ".", "[SEP]", "[CLS]"]]


class Own(nn.Module):
    """A model of somebody's own, in plain operations, that takes ids alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.qkv = nn.Embedding(128, 8), nn.Linear(8, 24)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.embedding(idx)).chunk(3, -1)
        return (q @ k.mT / 8**0.5).softmax(-1) @ v


class Characters:
    """Its tokenizer."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_a_model_of_ones_own_with_a_tokenizer_of_ones_own() -> None:
    found = hookattn.trace_text(Own(), ["hello", "world"], tokenizer=Characters())
    assert found.tokens == [list("hello"), list("world")] and len(found) == 1
    assert found[0].weights.shape[-2:] == (5, 5)
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    assert hookattn.trace_text(Own(), "a dog", tokenizer=own).tokens == [["a", "dog"]]


def test_pictures_and_sounds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    from PIL import Image

    Image.new("RGB", (40, 50), "red").save(tmp_path / "a.png")
    found = hookattn.trace_text(tmp_path / "vit", images=tmp_path / "a.png")
    assert found[0].weights.shape == (1, 2, 17, 17) and found.tokens is None
    assert hookattn.trace_text(tmp_path / "vit", images=[Image.new("RGB", (9, 9))] * 2)[0].weights.shape[0] == 2

    sound = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8),
        conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    transformers.Wav2Vec2Model(sound).save_pretrained(tmp_path / "wav")
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(tmp_path / "wav")
    samples = (np.sin(np.arange(4000) / 9) * 3e4).astype("<i2")
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, len(samples), "NONE", ""))
        file.writeframes(samples.tobytes())
    one = hookattn.trace_text(tmp_path / "wav", audio=tmp_path / "a.wav")
    for given in ((samples / 2.0**15, 16_000), torch.tensor(samples / 2.0**15), [(samples / 2.0**15, 16_000)]):
        other = hookattn.trace_text(tmp_path / "wav", audio=given)
        assert torch.allclose(one[0].weights, other[0].weights, atol=1e-6)
    with pytest.raises(InputError, match=r"8000 samples a second.*16000"):
        hookattn.trace_text(tmp_path / "wav", audio=(samples, 8_000))
    with pytest.raises(InputError, match="no image processor"):
        hookattn.trace_text(encoder(), images=tmp_path / "a.png")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"model": "no/such/model/here", "text": "a"}, ModelError, "no such directory"),
        ({"model": nn.Linear(2, 2), "text": "a"}, InputError, "has no tokenizer"),
        ({"model": 3, "text": "a"}, InputError, "expected a name"),
        ({"text": None}, InputError, "there is nothing to run the model on"),
        ({"text": None, "pair": "a"}, InputError, "give the first as text"),
        ({"text": []}, InputError, "text"),
        ({"text": 7}, InputError, "text"),
        ({"text": ["a", 7]}, InputError, "text"),
        ({"text": ["a", "dog"], "pair": "cat"}, InputError, "expected one for each text, 2, and got 1"),
        ({"text": "a", "pair": 3}, InputError, "pair"),
        ({"text": {"a": "b"}}, InputError, "text"),
        ({"text": {"a", "dog"}}, InputError, "text"),
        ({"text": "a", "pair": {"cat": 1}}, InputError, "pair"),
        ({"text": "a", "processor": print}, InputError, "processor: it is for images= and audio="),
        ({"text": "a", "generate": 0}, InputError, "generate"),
        ({"text": "a", "load": {"dtype": "auto"}}, InputError, "load"),
        ({"text": "a", "tokenizer": print}, InputError, "tokenizer: expected one of transformers"),
        ({"text": "a", "nope": 1}, InputError, "nope"),
        ({"text": "a", "capture": "nope"}, hookattn.SelectionError, "nope"),
        ({"text": ""}, InputError, "makes no token"),
        ({"text": [{"role": "user", "content": "a"}]}, InputError, "chat"),
    ],
)
def test_what_is_wrong_is_said(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        hookattn.trace_text(**{"model": decoder(), "tokenizer": tokenizer() if "model" not in given else None, **given})


def test_a_model_that_cannot_do_it(directory: str) -> None:
    with pytest.raises(ModelError, match="no generate"):
        hookattn.trace_text(Own(), "hello", tokenizer=Characters(), generate=2)
    with pytest.raises(InputError, match=r"takes no attention_mask.*7, 3"):
        hookattn.trace_text(Own(), [A, "a dog ."], tokenizer=tokenizer())
    with pytest.raises(InputError, match="5, 2 tokens"):
        hookattn.trace_text(Own(), ["hello", "hi"], tokenizer=Characters())
    Path(directory, "tokenizer.json").unlink()
    Path(directory, "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer: put its files"):
        hookattn.trace_text(directory, A)


def test_the_command_line_takes_the_same_way(directory: str, tmp_path: Path) -> None:
    pytest.importorskip("click")
    from click.testing import CliRunner

    from hookattn.cli.commands import app

    out = str(tmp_path / "t.safetensors")
    made = CliRunner().invoke(app, ["trace", directory, "--pair", A, B, "-o", out, "--json"])
    assert made.exit_code == 0, made.output
    found, expected = hookattn.load(out), hookattn.trace_text(directory, A, pair=B)
    assert (found.tokens, found.segments) == (expected.tokens, expected.segments) and json.loads(made.stdout)
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(found, expected, strict=True))
