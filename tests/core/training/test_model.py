import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

from verippo.core.text.stop_tokens import stop_token_ids
from verippo.core.training.packing import empty_batch, pack
from verippo.core.training.pretrained import (
    check_same_vocabulary,
    context_length,
    load_classifier,
    load_config,
    load_critic,
    load_policy,
    load_tokenizer,
    save_model,
)

FAMILIES = [
    ("llama", False),
    ("llama", True),
    ("qwen2", False),
    ("qwen2", True),
    ("qwen3", False),
    ("qwen3", True),
]
SIZES = [(5, 3), (1, 1), (2, 17), (30, 1)]


def random_rows(sizes=SIZES, seed=0, vocab=320):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, vocab, (n,), generator=generator).tolist()  # noqa: E731
    return [SimpleNamespace(prompt_ids=draw(p), response_ids=draw(r)) for p, r in sizes]


def plain(folder, auto=AutoModelForCausalLM, **options):
    """transformers alone: its own eager attention, nothing packed."""
    return auto.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, **options
    ).eval()


def separate_logprobs(model, row, temperature):
    """Log-probs and entropies of one response, from all logits of one sequence."""
    ids = torch.tensor([row.prompt_ids + row.response_ids])
    before = len(row.prompt_ids) - 1
    log_p = torch.log_softmax(model(ids).logits[0, before:-1].float() / temperature, dim=-1)
    targets = torch.tensor(row.response_ids)[:, None]
    return log_p.gather(1, targets).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def policy(make_model):
    return load_policy(make_model("llama"), dtype="fp32")


@pytest.mark.parametrize(("kind", "tied"), FAMILIES)
def test_a_packed_forward_equals_transformers_one_sequence_at_a_time(make_model, kind, tied):
    folder, rows = make_model(kind, tied=tied), random_rows()
    batch, model = pack(rows), plain(folder)
    with torch.no_grad():
        logprobs, entropy = load_policy(folder, dtype="fp32")(
            batch, temperature=0.7, with_entropy=True
        )
        expected = [separate_logprobs(model, row, 0.7) for row in rows]
    close(logprobs[batch.response_mask], torch.cat([part[0] for part in expected]))
    close(entropy[batch.response_mask], torch.cat([part[1] for part in expected]))
    assert not logprobs[~batch.response_mask].any()
    assert not entropy[~batch.response_mask].any()


@pytest.mark.parametrize(("kind", "tied"), FAMILIES)
def test_gradients_equal_transformers_one_sequence_at_a_time(make_model, kind, tied):
    folder, rows = make_model(kind, tied=tied), random_rows()
    policy, model = load_policy(folder, dtype="fp32"), plain(folder)
    weights = torch.linspace(
        -1, 2, sum(len(row.response_ids) for row in rows)
    )  # an advantage a token
    batch = pack(rows)
    logprobs, entropy = policy(batch, temperature=0.7, with_entropy=True)
    (weights * (logprobs + 0.3 * entropy)[batch.response_mask]).sum().backward()
    expected = [separate_logprobs(model, row, 0.7) for row in rows]
    (weights * torch.cat([part[0] + 0.3 * part[1] for part in expected])).sum().backward()
    ours = dict(policy.hf.named_parameters())
    assert ours.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        error = (ours[name].grad - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < 1e-5, (name, error)


def test_many_query_heads_on_one_key_head_equal_transformers(make_model):
    folder, rows = (
        make_model("qwen3", num_attention_heads=6, num_key_value_heads=1, head_dim=16),
        random_rows(),
    )
    batch, model = pack(rows), plain(folder)
    with torch.no_grad():
        expected = torch.cat([separate_logprobs(model, row, 1.0)[0] for row in rows])
        close(load_policy(folder, dtype="fp32")(batch)[batch.response_mask], expected)


def test_a_real_model_gives_what_transformers_gives(shared):
    folder = shared / "models" / "stories260K"
    rows = random_rows([(40, 25), (7, 60)], vocab=512)
    batch, model = pack(rows), plain(folder)
    with torch.no_grad():
        expected = torch.cat([separate_logprobs(model, row, 1.0)[0] for row in rows])
        close(load_policy(str(folder), dtype="fp32")(batch)[batch.response_mask], expected)


@settings(max_examples=10, deadline=None)
@given(changed=st.integers(0, 3), seed=st.integers(1, 1000))
def test_no_sequence_sees_another(policy, changed, seed):
    rows, others = random_rows(), random_rows(seed=seed)
    with torch.no_grad():
        before = policy(pack(rows))
        rows[changed] = others[changed]
        batch = pack(rows)
        after = policy(batch)
    assert torch.equal(before[batch.seq_ids != changed], after[batch.seq_ids != changed])
    assert not torch.equal(before, after)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(4)))
def test_order_and_company_in_a_batch_change_nothing(policy, order):
    batch = pack(random_rows())
    with torch.no_grad():
        whole = policy(batch)
        close(policy(batch.select(order)), whole[batch.token_index(order)], 1e-6)
        close(policy(batch.select(order[:1])), whole[batch.token_index(order[:1])], 1e-6)


@pytest.mark.parametrize("load", [load_policy, load_critic])
def test_only_response_positions_reach_the_head(make_model, load):
    model, batch = load(make_model("llama"), dtype="fp32"), pack(random_rows())
    rows_seen = []
    head = model.hf.lm_head if load is load_policy else model.hf.score
    head.register_forward_pre_hook(
        lambda module, arguments: rows_seen.append(arguments[0].shape[0])
    )
    model(batch)
    assert rows_seen == [3 + 1 + 17 + 1]


@pytest.mark.parametrize("load", [load_policy, load_critic])
def test_a_batch_without_responses_gives_every_parameter_a_zero_gradient(make_model, load):
    model = load(make_model("llama"), dtype="fp32")
    model(empty_batch()).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_the_greedy_flag_marks_the_likeliest_token(make_model):
    folder, rows = make_model("llama"), random_rows([(4, 12)])
    model = plain(folder)
    with torch.no_grad():
        likeliest = (
            model(torch.tensor([rows[0].prompt_ids + rows[0].response_ids]))
            .logits[0, 3:-1]
            .argmax(-1)
        )
        rows[0].response_ids[-1] = int(likeliest[-1])  # the last token: nothing before it changes
        expected = (likeliest == torch.tensor(rows[0].response_ids)).float()
        logprobs, greedy = load_policy(folder, dtype="fp32")(pack(rows), with_greedy=True)
    assert greedy.tolist() == [0.0] * 4 + expected.tolist()
    assert greedy[-1] == 1
    close(logprobs, load_policy(folder, dtype="fp32")(pack(rows)))


def test_a_critic_starts_at_zero(make_model):
    critic, batch = load_critic(make_model("llama"), dtype="fp32"), pack(random_rows())
    assert not critic.hf.score.weight.any()
    assert critic(batch).tolist() == [0.0] * batch.num_tokens


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_value_is_that_of_the_state_before_its_token(make_model, kind):
    folder, rows = make_model(kind), random_rows()
    critic, model, batch = load_critic(folder, dtype="fp32"), plain(folder), pack(rows)
    head = torch.linspace(-1, 1, 32)
    with torch.no_grad():
        critic.hf.score.weight.copy_(head[None])
        values, expected = critic(batch), []
        for row in rows:
            hidden = model.model(
                torch.tensor([row.prompt_ids + row.response_ids])
            ).last_hidden_state[0]
            expected += [
                hidden[len(row.prompt_ids) - 1 + t] @ head for t in range(len(row.response_ids))
            ]
    close(values[batch.response_mask], torch.stack(expected))
    assert not values[~batch.response_mask].any()


def test_the_last_response_token_does_not_reach_its_own_value_or_any_before(make_model):
    critic, rows = load_critic(make_model("llama"), dtype="fp32"), random_rows([(4, 5)])
    with torch.no_grad():
        critic.hf.score.weight.fill_(1.0)
        before = critic(pack(rows))
        rows[0].response_ids[-1] = 5 if rows[0].response_ids[-1] != 5 else 6
        assert torch.equal(critic(pack(rows)), before)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_classifier_gives_transformers_own_logits(make_model, kind):
    folder, rows = make_model(kind, classes=2), random_rows()
    model = plain(folder, AutoModelForSequenceClassification)
    with torch.no_grad():
        logits = load_classifier(folder, dtype="fp32")(pack(rows))
        expected = torch.cat(
            [model(torch.tensor([row.prompt_ids + row.response_ids])).logits for row in rows]
        )
    close(logits, expected)


def test_a_missing_class_head_is_refused_unless_a_fresh_one_is_asked_for(make_model):
    folder = make_model("llama")
    with pytest.raises(
        ValueError,
        match=r"no classification head \(score.weight\) in it: train one with `verippo verifier`",
    ):
        load_classifier(folder, dtype="fp32")
    assert (
        load_classifier(folder, dtype="fp32", fresh_head=True)(pack(random_rows())).tolist()
        == [[0.0, 0.0]] * 4
    )


def test_a_head_of_another_size_is_refused_by_name(make_model):
    with pytest.raises(ValueError, match="another shape than llama needs: score.weight"):
        load_critic(make_model("llama", classes=2), dtype="fp32")


def test_head_of_a_critic_is_kept_fresh_or_refused(make_model):
    plain, scored, classes = (make_model("llama", classes=n, seed=8) for n in (None, 1, 2))
    batch = pack(random_rows())

    def values(folder, head):
        with torch.no_grad():
            return load_critic(folder, dtype="fp32", head=head)(batch)

    own = values(scored, "kept")
    assert float(own.abs().max()) > 0
    assert torch.equal(values(scored, "auto"), own)
    for folder, head in [(scored, "fresh"), (plain, "fresh"), (plain, "auto"), (classes, "fresh")]:
        assert not values(folder, head).any()
    with pytest.raises(ValueError, match="critic_head=kept, but there is no head"):
        values(plain, "kept")
    for head in ("auto", "kept"):
        with pytest.raises(ValueError, match="score.weight; for a critic, critic_head=fresh"):
            values(classes, head)


def test_weights_that_the_folder_lacks_are_refused_never_made_up(make_model):
    with pytest.raises(ValueError, match="weights are missing .*lm_head.weight"):
        load_policy(make_model("llama", classes=2), dtype="fp32")


@pytest.mark.parametrize(
    ("make_config", "window"),
    [
        (MistralConfig, {"sliding_window": 8}),
        (Qwen2Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_sliding_window_attention_is_refused(tmp_path, make_config, window):
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    AutoModelForCausalLM.from_config(make_config(**sizes, **window)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding-window attention is not supported"):
        load_policy(tmp_path, dtype="fp32")


def test_a_window_that_is_switched_off_is_no_window(make_model):
    load_policy(make_model("qwen2", sliding_window=8), dtype="fp32")


def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path):
    for load in (load_policy, load_critic, load_classifier):
        with pytest.raises(ValueError, match=f"model {tmp_path}: cannot be loaded"):
            load(tmp_path, dtype="fp32")
    with pytest.raises(ValueError, match=f"model {tmp_path}: no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_damaged_model_is_refused_by_name(make_model, tmp_path):
    folder = shutil.copytree(make_model(), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(ValueError, match=f"model {folder}: cannot be loaded: "):
        load_policy(folder, dtype="fp32")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 320', '"vocab_size": "many"'))
    with pytest.raises(ValueError, match=f"model {folder}: cannot be loaded: "):
        load_config(folder)
    with pytest.raises(ValueError, match=f"model {folder}: no tokenizer: "):
        load_tokenizer(folder)


def test_dropout_is_off_even_while_training(tmp_path):
    sizes = {
        "vocab_size": 320,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    dropouts = {"attention_dropout": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    AutoModelForCausalLM.from_config(
        Phi3Config(**sizes, **dropouts, pad_token_id=0)
    ).save_pretrained(tmp_path)
    policy, batch = load_policy(tmp_path, dtype="fp32").train(), pack(random_rows())
    with torch.no_grad():
        assert torch.equal(policy(batch), policy(batch))
        close(policy(batch), policy.eval()(batch), 1e-7)


def test_gradient_checkpointing_changes_no_gradient(make_model):
    batch, grads = pack(random_rows()), []
    for checkpointed in (False, True):
        policy = load_policy(make_model("qwen3"), dtype="fp32").train()
        if checkpointed:
            policy.hf.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        policy(batch).sum().backward()
        grads.append([parameter.grad for parameter in policy.parameters()])
    for plain_grad, checkpointed_grad in zip(*grads, strict=True):
        close(checkpointed_grad, plain_grad, 1e-6)


def test_two_vocabularies_are_refused_with_both_names(make_model, tokenizer_folder, tmp_path):
    first, second = make_model("llama"), make_model("llama", tied=True)
    check_same_vocabulary(first, second)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check_same_vocabulary(first, tmp_path)
    for part in (str(first), str(tmp_path), "320 and 321 tokens, 1 differ"):
        assert part in str(error.value)


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no eos_token: responses could never end"):
        load_tokenizer(tmp_path)


def test_stop_ids_are_the_tokenizers_and_those_of_the_generation_config(make_model, tmp_path):
    folder = make_model("llama")
    tokenizer = load_tokenizer(folder)
    assert stop_token_ids(folder, tokenizer) == (2,)
    model = plain(folder)
    model.generation_config.eos_token_id = [7, 2, 5]
    model.save_pretrained(tmp_path)
    assert stop_token_ids(tmp_path, tokenizer) == (2, 5, 7)
    (tmp_path / "generation_config.json").unlink()
    assert stop_token_ids(tmp_path, tokenizer) == (2,)


def test_the_context_length_is_the_configurations(make_model):
    assert context_length(load_config(make_model("llama", max_position_embeddings=77))) == 77


@pytest.mark.parametrize(("kind", "tied"), FAMILIES)
def test_an_exported_policy_loads_in_transformers_with_equal_logits(
    make_model, tmp_path, kind, tied
):
    folder = make_model(kind, tied=tied)
    policy, tokenizer = load_policy(folder, dtype="fp32"), load_tokenizer(folder)
    with torch.no_grad():
        for (
            parameter
        ) in policy.parameters():  # as if trained: none may come back from the old folder
            parameter.add_(0.01 * torch.randn_like(parameter))
    state = {name: tensor.detach().clone() for name, tensor in policy.hf.named_parameters()}
    save_model(tmp_path, policy.hf, state, tokenizer)
    model, ids = plain(tmp_path), torch.randint(3, 320, (1, 20))
    weights = dict(policy.hf.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    original = plain(folder)
    original.load_state_dict(state, strict=False)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert stop_token_ids(tmp_path, tokenizer) == stop_token_ids(folder, tokenizer)
    batch = pack(random_rows())
    with torch.no_grad():  # the policy itself is none the worse
        assert torch.equal(policy(batch), load_policy(tmp_path, dtype="fp32")(batch))


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_the_files_of_an_export_follow_the_umask(make_model, tmp_path, mask, mode):
    policy = load_policy(make_model(), dtype="fp32")
    before = os.umask(mask)
    try:
        save_model(tmp_path, policy.hf, policy.hf.state_dict(), load_tokenizer(make_model()))
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {mode}


def test_a_full_disk_is_named_while_a_model_is_exported(make_model, tmp_path, monkeypatch):
    policy = load_policy(make_model(), dtype="fp32")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    (tmp_path / "model").mkdir()
    (
        tmp_path / "model" / "model.safetensors"
    ).mkdir()  # safetensors fails on it with an error of its own, as on a full disk
    with pytest.raises(ValueError, match=f"{tmp_path}: no space left for model: free some"):
        save_model(
            tmp_path / "model", policy.hf, policy.hf.state_dict(), load_tokenizer(make_model())
        )


def test_an_exported_classifier_loads_again_with_equal_logits(make_model, tmp_path):
    classifier, batch = (
        load_classifier(make_model("qwen2", classes=2), dtype="fp32"),
        pack(random_rows()),
    )
    tokenizer = load_tokenizer(make_model("qwen2"))
    save_model(tmp_path, classifier.hf, dict(classifier.hf.named_parameters()), tokenizer)
    with torch.no_grad():
        assert torch.equal(load_classifier(tmp_path, dtype="fp32")(batch), classifier(batch))


def test_bf16_stays_near_fp32(make_model):
    folder, batch = make_model("llama"), pack(random_rows())
    with torch.no_grad():
        exact, low = (load_policy(folder, dtype=dtype)(batch) for dtype in ("fp32", "bf16"))
    assert low.dtype == torch.float32
    assert (
        low - exact
    ).abs().max() < 0.5  # the logits' spread is about 20; a wrong position costs several nats
    assert (low - exact).abs().mean() < 0.1
