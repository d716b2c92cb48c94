"""An advantage estimator of your own. From this folder, run

    verippo ppo --advantage_function my_advantage:leave_one_out_baseline ...

The function is called once a step, on every rank with the same arguments, after the rewards are
known and before any weight moves.
"""

import torch


def leave_one_out_baseline(rewards, values, batch, rollouts):
    """Advantage of a response: its reward minus the mean reward of the step's other responses.

    Args:
        rewards: [tokens], reward of each token: KL penalty, and the score on the last token.
        values: [tokens], critic's value of the state before each token.
        batch: the packed rollouts; `batch.response_mask` [tokens] marks what the policy wrote,
            `batch.seq_ids` [tokens] says which rollout a token belongs to.
        rollouts: the step's rollouts, in the order of the packed sequences.

    Returns:
        advantages, returns: [tokens] each, zero outside `batch.response_mask`. The returns are
        the critic's targets: here the reward still to come.
    """
    mask = batch.response_mask
    totals = torch.zeros(len(rollouts)).index_add(0, batch.seq_ids, torch.where(mask, rewards, 0))
    others = (totals.sum() - totals) / max(1, len(rollouts) - 1)
    advantages = (totals - others)[batch.seq_ids]

    earlier = torch.where(mask, rewards, 0).cumsum(0) - torch.where(mask, rewards, 0)
    first = batch.cu_seqlens[:-1].long()
    to_come = totals[batch.seq_ids] - (earlier - earlier[first][batch.seq_ids])
    return torch.where(mask, advantages, 0), torch.where(mask, to_come, 0)
