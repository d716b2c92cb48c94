"""A rollout function of your own. From this folder,

    verippo ppo --rollout_function my_rollout:rollout ...

It gets the prompts of one rank and returns one rollout each, in order. Wrap the project's own function, as here, or
call `sampler.generate` yourself. Under several ranks each calls it with its own prompts.
"""

from dataclasses import replace

from verippo.core.sampling.sampler import draw_seed
from verippo.rl import rollout as verippo_rollout


def rollout(sampler, prompts, sampling, *, tokenizer):
    """Draws a response for each prompt, and once more for those that were cut off; the second draw counts.

    Mind what that does: the policy is then trained on responses that are shorter than its own.
    """
    first = verippo_rollout.rollout(sampler, prompts, sampling, tokenizer=tokenizer)
    cut = [number for number, one in enumerate(first) if one.truncated]
    # A prompt's seed fixes its draws: another seed, made from the old one, gives another response, the same in every run.
    again = [replace(prompts[number], seed=draw_seed(prompts[number].seed, 1)) for number in cut]
    second = verippo_rollout.rollout(sampler, again, sampling, tokenizer=tokenizer)
    for number, one in zip(cut, second, strict=True):
        first[number] = one
    return first
