"""A rollout function of two turns: the policy answers, is asked to verify, and answers again.

    verippo ppo --rollout_function verify_then_answer_rollout:rollout ...

The verifier scores the last answer alone; both turns are trained. `sampling.max_new_tokens` is the
limit of both turns together with the request between them.
"""

from verippo.rl.turns import Conversation, sample_turns, turn_sampling

REQUEST = "Check your answer step by step, then answer again."


def rollout(sampler, prompts, sampling, *, tokenizer):
    """Samples two turns for each prompt; a turn that is cut off ends its conversation."""
    conversations = [Conversation(prompt, tokenizer) for prompt in prompts]
    of_a_turn = turn_sampling(sampling, 2)
    sample_turns(conversations, sampler, of_a_turn)
    asked = [
        one for one in conversations if one.add_message(REQUEST, limit=of_a_turn.max_new_tokens)
    ]
    sample_turns(asked, sampler, of_a_turn)
    return [conversation.rollout(text=conversation.last_text) for conversation in conversations]
