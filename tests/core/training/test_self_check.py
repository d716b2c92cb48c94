"""A model family runs as transformers runs it, or is refused when it is loaded, in one line."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from verippo.core.sampling.local_sampler import LocalSampler, check_sampling
from verippo.core.sampling.sampler import Prompt, SamplingParams
from verippo.core.training.packing import pack
from verippo.core.training.pretrained import load_causal_lm, load_critic, load_policy
from verippo.core.training.self_check import own_outputs, small_model

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
}


@pytest.fixture
def save(tmp_path):
    def make(name, **overrides):
        config = getattr(transformers, name)(**{**SIZES, **overrides})
        small_model(transformers.AutoModelForCausalLM, config).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


ROPE = {"rope_theta": 1e4, "factor": 4.0}
LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("BloomConfig", {"n_layer": 2, "n_head": 4}, "differ from transformers' own by"),
        ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", **ROPE}}, "rope_type dynamic"),
        (
            "LlamaConfig",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "original_max_position_embeddings": 32,
                    **ROPE,
                    **LONGROPE,
                }
            },
            "rope_type longrope",
        ),
        ("Gemma2Config", {"layer_types": ["full_attention"] * 2}, "final_logit_softcapping is not"),
        ("MistralConfig", {"sliding_window": 16}, "sliding-window attention is not supported"),
        ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "layers of kind conv are not"),
        ("StableLmConfig", {}, "do not pass the boundaries of sequences"),
        (
            "GptOssConfig",
            {"layer_types": ["full_attention"] * 2, "num_local_experts": 4},
            "differ",
        ),
    ],
)
def test_family_that_would_be_wrong_is_refused_in_one_line(save, name, overrides, reason):
    folder = save(name, **overrides)
    for load in (load_policy, load_causal_lm):
        with pytest.raises(ValueError, match=f"model {folder}.*{reason}") as caught:
            load(folder, dtype="fp32")
        assert "\n" not in str(caught.value)


def test_wrapped_decoder_is_refused(tmp_path):
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = transformers.Gemma3Config(text_config=SIZES, vision_config=vision)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gemma3.*wraps a text decoder"):
        load_policy(str(tmp_path), dtype="fp32")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("LlamaConfig", {}),
        ("Qwen3Config", {}),
        ("GraniteConfig", {"logits_scaling": 8.0}),
        ("CohereConfig", {"logit_scale": 0.25}),
    ],
)
def test_scaled_logits_are_transformers_own(save, name, overrides):
    folder = save(name, **overrides)
    check_sampling(load_causal_lm(folder, dtype="fp32").config, folder)
    reference = load_causal_lm(folder, dtype="fp32")
    reference.set_attn_implementation("eager")
    prompt = list(range(5, 30))
    sampler = LocalSampler(load_causal_lm(folder, dtype="fp32"), stop_token_ids=[])
    params = SamplingParams(temperature=1.0, max_new_tokens=6)
    (drawn,) = sampler.generate([Prompt(token_ids=prompt, seed=1)], params)
    tokens = list(drawn.token_ids)
    with torch.no_grad():
        own = own_outputs(reference, prompt + tokens)[len(prompt) - 1 : -1]
        packed = pack([SimpleNamespace(prompt_ids=prompt, response_ids=tokens)])
        trained = load_policy(folder, dtype="fp32")(packed)[len(prompt) :]
    expected = own.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
    assert torch.allclose(torch.tensor(drawn.logprobs), expected, atol=1e-5)
    assert torch.allclose(trained, expected, atol=1e-5)


def test_family_without_a_critic_names_the_way_out(save):
    folder = save("CohereConfig")
    with pytest.raises(ValueError, match=r"cohere.*--advantage rloo, grpo or reinforce\+\+"):
        load_critic(folder, dtype="fp32")
