"""Small random models of Hugging Face transformers, their inputs, and their attention calls.

For test_architectures.py and test_coverage.py."""

import pytest
import torch
from helpers import MODEL_SIZES

import mra_attention as mra

transformers = pytest.importorskip("transformers")

SIZES = dict(MODEL_SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
VISION = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    image_size=48, patch_size=4,
)  # fmt: skip
B, N, LENGTHS = 3, 130, (130, 60, 5)


def text(length=N, **more):
    return {"input_ids": torch.randint(3, 99, (B, length)), **more}


def padding():
    return (torch.arange(N) < torch.tensor(LENGTHS)[:, None]).long()


def padded_text(**more):
    return text(attention_mask=padding(), **more)


def pictures():
    return {"pixel_values": torch.randn(B, 3, 48, 48)}  # 144 patches and the class token


def bert(**options):
    return transformers.BertModel(transformers.BertConfig(**SIZES, **options))


def roberta():
    return transformers.RobertaModel(transformers.RobertaConfig(**SIZES))


def modernbert():
    """Layers 1 and 3 see a window of 64 tokens, layers 0 and 2 everything."""
    return transformers.ModernBertModel(
        transformers.ModernBertConfig(
            **SIZES | dict(num_hidden_layers=4), cls_token_id=1, sep_token_id=2,
            global_attn_every_n_layers=2, local_attention=64,
        )
    )  # fmt: skip


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**VISION))


def clip_text():
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES))


def clip_vision():
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))


def t5_encoder():
    config = transformers.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4
    )
    return transformers.T5EncoderModel(config)


def whisper_encoder():
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(
        num_mel_bins=8, d_model=64, encoder_layers=2, encoder_attention_heads=4,
        encoder_ffn_dim=64, max_source_positions=N,
    )  # fmt: skip
    return WhisperEncoder(config)


def bart():
    config = transformers.BartConfig(
        vocab_size=99, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.BartModel(config)


def llama():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    return transformers.LlamaModel(config)


def bert_decoder():
    return bert(is_decoder=True, add_cross_attention=True)


def crossed(mask=True):
    """Text for a decoder beside the states of an encoder, of another length and padded."""
    more = {"encoder_attention_mask": padding()} if mask else {}
    states = torch.randn(B, N, 64)
    return text(70, encoder_hidden_states=states, use_cache=False, **more)


def translated(**more):
    return padded_text(
        decoder_input_ids=torch.randint(3, 99, (B, 70)), use_cache=False, **more
    )  # fmt: skip


# name: (model, inputs, attention calls of one forward pass).
CASES = {
    "bert": (bert, text, {"mra": 2}),
    "bert, padded": (bert, padded_text, {"mra": 2}),
    "roberta, padded": (roberta, padded_text, {"mra": 2}),
    # A window is a mask of single queries and keys: exact, by way of its 4-D mask.
    "modernbert": (modernbert, text, {"mra": 2, "exact: 4-D mask": 2}),
    "modernbert, padded": (modernbert, padded_text, {"mra": 2, "exact: 4-D mask": 2}),
    "vit": (vit, pictures, {"mra": 2}),
    "clip text": (clip_text, text, {"mra": 2}),
    "clip text, padded": (clip_text, padded_text, {"mra": 2}),
    "clip vision": (clip_vision, pictures, {"mra": 2}),
    # T5 adds a learned bias to each score.
    "t5 encoder, padded": (t5_encoder, padded_text, {"exact: position_bias": 2}),
    "whisper encoder": (
        whisper_encoder, lambda: {"input_features": torch.randn(B, 8, 2 * N)}, {"mra": 2},
    ),
    # Two layers of an encoder; two of a decoder, each with itself and with the encoder.
    "bart, padded": (bart, translated, {"mra": 6}),
    "bart, both padded": (
        bart, lambda: translated(decoder_attention_mask=padding()[:, :70]), {"mra": 6},
    ),
    "llama, grouped heads": (llama, lambda: text(use_cache=False), {"mra": 2}),
    "llama, padded": (llama, lambda: padded_text(use_cache=False), {"mra": 2}),
    "bert decoder": (bert_decoder, crossed, {"mra": 4}),
    "bert decoder, nothing padded": (bert_decoder, lambda: crossed(mask=False), {"mra": 4}),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)


def spread(model):
    """The model with attention weights that tell tokens apart: as built, all scores are near 0, and
    a wrong scale or a wrong plan would hardly show."""
    for at in mra.transformers.coverage(model).served:
        for p in model.get_submodule(at).parameters():
            if p.dim() == 2 and min(p.shape) >= 32:
                torch.nn.init.normal_(p, std=0.15)
    return model
