"""A rollout engine of your own: anything with `generate` and `update_weights`. From this folder,

    verippo ppo --sampler.kind factory --sampler.factory my_engine:make ...

This one wraps transformers' `generate`, one prompt at a time: slow, and as plain as can be.
"""

import torch
from transformers import AutoModelForCausalLM

from verippo.core.sampling.sampler import Completion


def make(model_path, stop_token_ids):
    """What --sampler.factory names: called once on every rank."""
    return PlainEngine(
        AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval(), stop_token_ids
    )


class PlainEngine:
    def __init__(self, model, stop_token_ids):
        self.model, self.stops, self.version = model, list(stop_token_ids), 0

    def update_weights(self, named_tensors, version):
        """Called after every step: full tensors under their Hugging Face names. Iterate to the end, on every rank."""
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in named_tensors:
                own[name].copy_(tensor)
        self.version = version

    def generate(self, prompts, params):
        """One completion a prompt. No top-p, no top-k: the log-probs must be those of the policy itself."""
        return [self.complete(prompt, params) for prompt in prompts]

    def complete(self, prompt, params):
        torch.manual_seed(
            prompt.seed
        )  # the prompt's own seed makes a resumed run draw what the unbroken one would have
        settings = (
            {"do_sample": True, "temperature": params.temperature}
            if params.temperature
            else {"do_sample": False}
        )
        ids = torch.tensor([prompt.token_ids])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=params.max_new_tokens,
            eos_token_id=self.stops,
            top_k=0,
            top_p=1.0,
            return_dict_in_generate=True,
            output_logits=True,
            **settings,
        )
        tokens = out.sequences[0, ids.shape[1] :]
        logprobs = (torch.cat(out.logits).float() / (params.temperature or 1.0)).log_softmax(-1)
        logprobs = logprobs[torch.arange(len(tokens)), tokens]
        reason = "stop" if int(tokens[-1]) in self.stops else "length"
        return Completion(
            token_ids=tokens.tolist(),
            logprobs=logprobs.tolist(),
            finish_reason=reason,
            version=self.version,
        )
