"""A model is sampled to the token with which its training answers end."""

import json

import pytest
from transformers import AutoTokenizer

from verippo.core.text.chat import end_of_turn_id, render_example
from verippo.core.text.stop_tokens import server_stop_ids, stop_token_ids

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def base_model(make_model, tmp_path):
    """A folder as base models have it: a ChatML template, but `</s>` as the end of sequence."""
    import shutil

    folder = tmp_path / "base"
    shutil.copytree(make_model(vocab=330), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


def test_the_templates_end_of_turn_is_a_stop_token(base_model):
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert render_example(tokenizer, turns)[1][-1] == im_end == end_of_turn_id(tokenizer)
    assert stop_token_ids(str(base_model), tokenizer) == (tokenizer.eos_token_id, im_end)
    assert server_stop_ids(str(base_model), tokenizer) == {tokenizer.eos_token_id}


def test_generation_config_names_further_stop_tokens(base_model):
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    (base_model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert {2, 7} <= set(stop_token_ids(str(base_model), tokenizer))


def test_a_template_without_answers_has_the_end_of_sequence(base_model):
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert stop_token_ids(str(base_model), tokenizer) == (tokenizer.eos_token_id,)
