"""A rollout function with a tool: the policy may call a calculator. From this folder, run

    verippo ppo --rollout_function calculator_rollout:rollout ...

A turn of the policy that ends in a call, such as `<calc>2+3+1</calc>`, is answered with the result,
and the policy goes on. It is trained on what it wrote, and never on results.

Calls are part of the policy's format: stage 1 has to teach them. A row of `messages` trains its
last turn, so a conversation with one call is two rows: question and call; question, call, result
and answer. The call has no headings, the answer has both.

`sampling.max_new_tokens` is the limit of a whole conversation, results included; each turn has an
equal share of it.
"""

import ast
import operator
import re

from verippo.rl.turns import converse

MAX_CALLS = 3
CALL = re.compile(r"<calc>([^<>]*)</calc>\s*$")
ARITHMETIC = re.compile(r"[-0-9.+*/() ]{1,200}")
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def rollout(sampler, prompts, sampling, *, tokenizer, max_calls=MAX_CALLS):
    """Samples a conversation for each prompt.

    For another number of calls, name a function of your own:
    `two_calls = functools.partial(rollout, max_calls=2)`.
    """
    conversations = converse(
        sampler,
        prompts,
        sampling,
        tokenizer=tokenizer,
        reply=reply,
        max_turns=max_calls + 1,
    )
    return [conversation.rollout() for conversation in conversations]


def reply(conversation):
    """The result of the call with which the policy's turn ends; None without a call."""
    call = CALL.search(conversation.last_text)
    return calculate(call[1]) if call else None


def calculate(expression):
    """The value of an expression of numbers, + - * / and brackets, as text; "error" for others."""
    if not ARITHMETIC.fullmatch(expression):
        return "error"
    try:
        return f"{value(ast.parse(expression.strip(), mode='eval').body):.12g}"
    except (SyntaxError, ValueError, ArithmeticError):
        return "error"


def value(node):
    """The value of a syntax tree; nothing in it is ever executed."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    raise ValueError("not arithmetic")
