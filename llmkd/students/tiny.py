"""Tiny random models and a byte-level tokenizer: what `--smoke` and the tests run on, with no download."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer(extra_tokens: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte, three special tokens (pad = eos) and a ChatML template; 259 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet, *extra_tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", bos_token=None
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def family_of(name: str, default: str = "llama") -> str:
    """Guess the architecture from a model's name: the longest known model type in it (`Qwen2.5-7B` is `qwen2`)."""
    flat = name.lower().replace("-", "").replace("_", "").replace(".", "")
    known = [kind for kind in CONFIG_MAPPING_NAMES if len(kind) > 3 and kind.replace("_", "").replace("-", "") in flat]
    return max(known, key=len, default=default)


def tiny_config(family: str = "llama", **changes: Any) -> PreTrainedConfig:
    """A config of a few thousand parameters in the given family; `changes` override single fields."""
    sizes: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(family, **{**sizes, **changes})


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model of that config, in fp32 and eval mode."""
    return AutoModelForCausalLM.from_config(config).float().eval()


def tiny_classifier(config: PreTrainedConfig) -> PreTrainedModel:
    """A random sequence classifier, or regressor, of that config, in fp32 and eval mode."""
    return AutoModelForSequenceClassification.from_config(config).float().eval()
