"""A rollout engine of your own. From this folder, run

    verippo ppo --sampler.kind factory --sampler.factory my_engine:make ...

Any object with `generate` and `update_weights` will do. This one wraps transformers' `generate`,
one prompt at a time: slow, but short.
"""

import torch
from transformers import AutoModelForCausalLM

from verippo.core.sampling.sampler import Completion


def make(model_path, stop_token_ids):
    """Creates the engine; called once on every rank."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    return PlainEngine(model.eval(), stop_token_ids)


class PlainEngine:
    """Samples with transformers."""

    def __init__(self, model, stop_token_ids):
        self.model = model
        self.stops = list(stop_token_ids)
        self.version = 0

    def update_weights(self, named_tensors, version):
        """Copies the trainer's weights; called on every rank after every step.

        Args:
            named_tensors: pairs of a Hugging Face name and a full tensor. Every rank must iterate
                to the end.
            version: number that the completions sampled from now on must carry.
        """
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in named_tensors:
                own[name].copy_(tensor)
        self.version = version

    def generate(self, prompts, params):
        """One completion per prompt, in order.

        Do not use top-p or top-k: the log-probs must be those of the policy itself.
        """
        return [self.complete(prompt, params) for prompt in prompts]

    def complete(self, prompt, params):
        """Samples one completion with the prompt's own seed, so that a resumed run repeats it."""
        torch.manual_seed(prompt.seed)
        if params.temperature:
            settings = {"do_sample": True, "temperature": params.temperature}
        else:
            settings = {"do_sample": False}
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
        logits = torch.cat(out.logits).float() / (params.temperature or 1.0)
        logprobs = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
        return Completion(
            token_ids=tokens.tolist(),
            logprobs=logprobs.tolist(),
            finish_reason="stop" if int(tokens[-1]) in self.stops else "length",
            version=self.version,
        )
