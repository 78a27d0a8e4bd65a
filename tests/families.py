"""Decoders of many families, tiny and at random, large enough in their weights that every part of them counts."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY, WINDOW = 96, 8
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
MOE = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}

# Name: the config's class and what makes it this family; all layers' sizes are alike.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama3 rope": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2 with a window": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 1} | MIXED),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral with a window": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8} | MIXED),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.2}),
    "cohere": ("CohereConfig", {"logit_scale": 0.0625}),
    "cohere2": ("Cohere2Config", MIXED),
    "starcoder2": ("Starcoder2Config", {"sliding_window": WINDOW}),
    "qwen2_moe": ("Qwen2MoeConfig", MOE),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": 4}),
}
WINDOWED = [name for name, (_, own) in FAMILIES.items() if own.get("sliding_window")]


def random_decoder(kind: str, **own: Any) -> PreTrainedModel:
    """A decoder of a config class; two layers, width 32."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
             "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # fmt: skip
    config = getattr(transformers, kind)(**(sizes | own))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()


def family(name: str, **changed: Any) -> PreTrainedModel:
    """The decoder of a family."""
    kind, own = FAMILIES[name]
    return random_decoder(kind, **(own | changed))
