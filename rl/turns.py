"""Rollouts of several turns: the policy writes, tools or users reply, the policy goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from ..core.sampling.sampler import Completion, Prompt, Sampler, SamplingParams, draw_seed
from ..core.text.chat import render_next_turn
from ..core.text.encoding import decode
from .rollout import Rollout, RolloutPrompt, check_completions


class Conversation:
    """A rollout that is built turn by turn.

    Token ids are never decoded and encoded again: what the policy is trained on are the very tokens
    that the sampler drew, and each turn is drawn after exactly the tokens that the trainer sees
    before it.

        conversations = [Conversation(prompt, tokenizer) for prompt in prompts]
        sample_turns(conversations, sampler, sampling)
        for conversation in conversations:
            conversation.add_message("Verify your answer.")
        sample_turns(conversations, sampler, sampling)
        return [conversation.rollout() for conversation in conversations]
    """

    def __init__(self, prompt: RolloutPrompt, tokenizer: PreTrainedTokenizerBase) -> None:
        """Args:
        prompt: the problem, with the token ids before the first turn.
        tokenizer: the policy's tokenizer.
        """
        self.prompt = prompt
        self.tokenizer = tokenizer
        self.turns: list[Completion] = []
        """What the policy wrote."""
        self.response_ids: list[int] = []
        """Everything after the prompt."""
        self.response_mask: list[bool] = []
        """Which of it the policy wrote."""
        self.truncated = False
        """Whether a length limit cut the conversation off."""

    @property
    def last_text(self) -> str:
        """The policy's last turn, without special tokens."""
        return decode(self.tokenizer, self.turns[-1].token_ids)

    def request(self) -> Prompt:
        """The request for the policy's next turn.

        Each turn has a seed of its own, which depends on run seed, step, problem, sample and turn
        alone; the first turn has that of `rollout`.
        """
        seed = self.prompt.seed
        if self.turns:
            seed = draw_seed(seed, len(self.turns))
        return Prompt(token_ids=[*self.prompt.token_ids, *self.response_ids], seed=seed)

    def add_turn(self, completion: Completion) -> None:
        """Appends a turn of the policy, which is trained.

        Raises:
            ValueError: it was sampled with other weights than the turns before it.
        """
        if self.turns and completion.version != self.turns[0].version:
            raise ValueError(
                f"turn {len(self.turns)} was sampled with weight version {completion.version}, the "
                f"first with {self.turns[0].version}: sample a conversation with the same weights"
            )
        self.turns.append(completion)
        self.response_ids += completion.token_ids
        self.response_mask += [True] * len(completion.token_ids)
        self.truncated = completion.finish_reason == "length"

    def add_context(self, token_ids: Sequence[int]) -> None:
        """Appends tokens that the policy did not write; they are read and never trained."""
        self.response_ids += token_ids
        self.response_mask += [False] * len(token_ids)

    def add_message(
        self,
        content: str,
        *,
        role: str = "user",
        limit: int | None = None,
    ) -> bool:
        """Appends a message as context, as the chat template writes it before the next turn.

        Args:
            content: the message.
            role: who speaks: "user", or "tool" where the chat template knows it.
            limit: response tokens that the conversation may have with it, context included.

        Returns:
            Whether it was appended. It is not where the conversation is truncated, and not where
            the limit leaves no room, by which the conversation becomes truncated.
        """
        if self.truncated:
            return False
        token_ids = render_next_turn(self.tokenizer, content, role=role)
        if limit is not None and len(self.response_ids) + len(token_ids) > limit:
            self.truncated = True
            return False
        self.add_context(token_ids)
        return True

    def rollout(self, *, text: str | None = None) -> Rollout:
        """The finished rollout.

        Args:
            text: what verifiers read; by default all turns and messages, without special tokens.
        """
        return Rollout(
            problem=self.prompt.problem,
            prompt_ids=self.prompt.token_ids,
            response_ids=self.response_ids,
            sampler_logprobs=[logprob for turn in self.turns for logprob in turn.logprobs],
            response_mask=self.response_mask,
            text=decode(self.tokenizer, self.response_ids) if text is None else text,
            truncated=self.truncated,
            sample=self.prompt.sample,
            version=self.turns[0].version,
        )


def sample_turns(
    conversations: Sequence[Conversation], sampler: Sampler, sampling: SamplingParams
) -> None:
    """Appends the policy's next turn to each conversation, in one call of the sampler.

    Args:
        conversations: those that go on; truncated ones are left as they are.
        sampler: the engine that holds the policy's weights.
        sampling: temperature and length limit of this turn.

    Raises:
        ValueError: the sampler returned something else than one completion for each conversation.
    """
    running = [conversation for conversation in conversations if not conversation.truncated]
    if not running:
        return
    completions = sampler.generate([one.request() for one in running], sampling)
    check_completions(completions, num=len(running))
    for conversation, completion in zip(running, completions, strict=True):
        conversation.add_turn(completion)


def turn_sampling(sampling: SamplingParams, max_turns: int) -> SamplingParams:
    """The sampling of each turn: an equal share of `max_new_tokens`.

    So that a conversation does not depend on how long the others are, and together with its context
    stays within `max_new_tokens`: after n turns and messages it has at most n shares.

    Raises:
        ValueError: there are more turns than tokens.
    """
    share = sampling.max_new_tokens // max_turns
    if not share:
        raise ValueError(
            f"sampling.max_new_tokens={sampling.max_new_tokens} is less than a token for each of "
            f"{max_turns} turns: raise it"
        )
    return replace(sampling, max_new_tokens=share)


def converse(
    sampler: Sampler,
    prompts: Sequence[RolloutPrompt],
    sampling: SamplingParams,
    *,
    tokenizer: PreTrainedTokenizerBase,
    reply: Callable[[Conversation], str | None],
    max_turns: int,
    role: str = "user",
) -> list[Conversation]:
    """Conversations in which a function replies to the policy's turns until it has no reply.

    The running conversations take each turn together, in one call of the sampler. A conversation
    also ends when the policy reaches a length limit or has had its last turn.

    Args:
        sampler: the engine that holds the policy's weights.
        prompts: this rank's prompts.
        sampling: temperature, and the length limit of a whole conversation with its context: each
            turn, with the replies so far, has an equal share (see `turn_sampling`).
        tokenizer: the policy's tokenizer.
        reply: maps a conversation after a turn of the policy to the next message, or to None where
            the conversation is finished.
        max_turns: turns of the policy, at most.
        role: role of the messages, for the chat template.

    Returns:
        One conversation per prompt, in order.
    """
    share = turn_sampling(sampling, max_turns)
    conversations = [Conversation(prompt, tokenizer) for prompt in prompts]
    running = conversations
    for turn in range(1, max_turns + 1):
        sample_turns(running, sampler, share)
        if turn < max_turns:
            limit = turn * share.max_new_tokens
            running = [one for one in running if _replied(one, reply, role=role, limit=limit)]
    return conversations


def _replied(
    conversation: Conversation,
    reply: Callable[[Conversation], str | None],
    *,
    role: str,
    limit: int,
) -> bool:
    """Whether a conversation goes on, with a reply to its last turn."""
    content = None if conversation.truncated else reply(conversation)
    return content is not None and conversation.add_message(content, role=role, limit=limit)
