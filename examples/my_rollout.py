"""A rollout function of your own. From this folder, run

    verippo ppo --rollout_function my_rollout:rollout ...

The function receives the prompts of one rank and returns one rollout per prompt, in order; every
rank calls it with its own prompts. Wrap the built-in function, as here, or call `sampler.generate`.
"""

from dataclasses import replace

from verippo.core.sampling.sampler import draw_seed
from verippo.rl import rollout as verippo_rollout


def rollout(sampler, prompts, sampling, *, tokenizer):
    """Samples a response to each prompt, and a second one in place of each truncated response.

    The policy is then trained on responses that are shorter than its own.
    """
    rollouts = verippo_rollout.rollout(sampler, prompts, sampling, tokenizer=tokenizer)
    truncated = [number for number, one in enumerate(rollouts) if one.truncated]
    # the same seed would give the same response; a seed derived from it is the same in every run
    retries = [replace(prompts[n], seed=draw_seed(prompts[n].seed, 1)) for n in truncated]
    again = verippo_rollout.rollout(sampler, retries, sampling, tokenizer=tokenizer)
    for number, one in zip(truncated, again, strict=True):
        rollouts[number] = one
    return rollouts
