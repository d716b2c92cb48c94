"""A policy loss of your own. From this folder, run

    verippo ppo --policy_loss_function my_policy_loss:clipped_weight_loss ...

The function is called once for every micro-batch. It returns a sum: the trainer divides by the
response tokens of the whole mini-batch, over all micro-batches and ranks.
"""

import torch

from verippo.rl.ppo import PolicyLoss

LARGEST_RATIO = 5.0


def clipped_weight_loss(logprobs, micro):
    """REINFORCE with a clipped importance weight: -sg(min(rho, 5)) A log pi (arXiv 2506.13585).

    Args:
        logprobs: [tokens], log-probs of the policy being trained; the only input with a gradient.
        micro: the micro-batch: `micro.logprobs` (of the policy that sampled), `micro.advantages`
            and `micro.mask` are [tokens]; `micro.batch.cu_seqlens` holds the sequences' bounds.
    """
    mask = micro.mask
    new = torch.where(mask, logprobs, 0.0)
    advantages = torch.where(mask, micro.advantages, 0.0)
    log_ratio = new.detach() - torch.where(mask, micro.logprobs, 0.0)
    ratio = log_ratio.exp()
    loss = -ratio.clamp(max=LARGEST_RATIO) * advantages * new
    return PolicyLoss(
        loss_sum=loss.sum(),
        num_tokens=mask.sum(),
        clip_sum=(ratio > LARGEST_RATIO).sum(),
        dual_clip_sum=torch.zeros_like(mask.sum()),
        approx_kl_sum=(ratio - 1 - log_ratio).sum(),
        ratio_max_abs_log=log_ratio.abs().max(),
    )
