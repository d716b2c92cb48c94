"""A rollout function that awaits a tool: a reviewer comments on each answer, all at the same time.

    verippo ppo --rollout_function async_review_rollout:rollout ...

A function defined with `async def` runs in an event loop of its own. `sampler.generate` blocks, as
it does elsewhere; tools are awaited together. Give every tool a time-out: the step waits for the
slowest, and a signal stops the run only after it.
"""

import asyncio

from verippo.rl.turns import Conversation, sample_turns, turn_sampling

TIMEOUT_SECONDS = 10


async def rollout(sampler, prompts, sampling, *, tokenizer):
    """Samples an answer to each prompt, and a second one after the review of the first."""
    conversations = [Conversation(prompt, tokenizer) for prompt in prompts]
    of_a_turn = turn_sampling(sampling, 2)
    sample_turns(conversations, sampler, of_a_turn)
    comments = await asyncio.gather(*(comment(one) for one in conversations))
    for conversation, text in zip(conversations, comments, strict=True):
        conversation.add_message(text, limit=of_a_turn.max_new_tokens)
    sample_turns(conversations, sampler, of_a_turn)  # leaves out those that are truncated
    return [conversation.rollout(text=conversation.last_text) for conversation in conversations]


async def comment(conversation):
    """The review of an answer; one that is late is left out."""
    question = conversation.prompt.problem.question
    try:
        return await asyncio.wait_for(review(question, conversation.last_text), TIMEOUT_SECONDS)
    except asyncio.TimeoutError:
        return "Answer again."


async def review(question, answer):
    """Stands for a request to a service; it never sees the reference answer."""
    await asyncio.sleep(0.01)
    short = len(answer.split()) < 6
    return "Explain your answer." if short else "Be brief."
