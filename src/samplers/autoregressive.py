"""Drawing from a distribution that is given place by place, each from the places before it.

Each place is drawn by inversion of its cumulated probabilities at one uniform number of the sample's own noise, so that a
sample depends neither on its batch nor on how many tokens are drawn after it.

References:
    See `core.tokens`, for the settings of a choice.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from src.core.protocols import NextTokenNetwork
from src.core.rng import Noise
from src.core.tokens import TokenChoice

__all__ = ["ancestral_sample", "chosen_logits", "continue_tokens", "draw_tokens"]


_LEAST_TEMPERATURE = 1e-30  # float32 divides by it; below, all but the greatest logit are as good as left out
_STATE_AT_A_TIME = 2**28  # numbers in the states of all rows, 1 GB in float32
_LOGITS_AT_A_TIME = 2**25


@torch.no_grad()
def ancestral_sample(
    logits_of: Callable[[Tensor], Tensor], n: int, grid: tuple[int, int], noise: Noise, like: Tensor
) -> Tensor:
    """n draws of codes on a grid `(h, w)`, row by row, `(n, h, w)` int64; each place by inversion of its cumulated
    probabilities at one uniform number of the sample's own noise.

    Args:
        logits_of: from codes `(n, h, w)` to logits `(n, K, h, w)`, of each place from those before it; called h w times.
        grid: height and width.
        noise: row i of what it gives belongs to sample i.
        like: on whose device to draw.
    """
    height, width = grid
    codes = torch.zeros(n, height, width, dtype=torch.int64, device=like.device)
    u = noise.uniform((n, height * width), like=like).unflatten(1, grid)
    for row in range(height):
        for column in range(width):
            codes[:, row, column] = draw_tokens(logits_of(codes)[:, :, row, column], u[:, row, column])
    return codes


@torch.no_grad()
def continue_tokens(
    network: NextTokenNetwork,
    prompt: Tensor,
    num_tokens: int,
    choice: TokenChoice,
    noise: Noise,
    condition: Tensor | None = None,
    is_done: Callable[[Tensor], Tensor] | None = None,
    cached: bool = True,
    stride: int = 1,
    num_drawn: int = 0,
    told: Callable[[int], None] = lambda num_tokens: None,
) -> list[Tensor]:
    """Draws of what follows each row of a prompt, `(num_tokens,)` int64 each, or shorter where `is_done`.

    As long as all tokens fit into the network it reads each of them once and keeps its state; from there on it sees the
    last `max_length` tokens, all of which it then reads anew for every token, or, with a stride, once in so many tokens.
    So many rows are drawn at a time as there is room for their states; no row depends on another.

    Args:
        network: in evaluation mode.
        prompt: `(B, P)` int64, P at least 1; of a longer one than `max_length` the last tokens are seen.
        num_tokens: to draw of each row.
        choice: how each token is drawn.
        noise: row i of what it gives belongs to row i of the prompt.
        condition: features `(B, C)`, or None.
        is_done: called with what was drawn so far of some rows `(R, i)`, says `(R,)` of which of them it is the end.
        cached: whether to keep a state; without one the result is the same, and slow.
        stride: what the network sees begins at a multiple of it, at the first from which all tokens fit.
        num_drawn: so many of the last tokens of the prompt were drawn, too, and are shown to `is_done`.
        told: how many tokens the network is given, each time that it is.
    """
    size, start = prompt.shape
    assert start >= max(1, num_drawn)
    assert num_tokens >= 1
    u = noise.uniform((size, num_tokens), like=torch.zeros((), device=prompt.device))
    of_one = network.state_size(min(start + num_tokens, network.max_length or start + num_tokens))
    rows = max(1, min(_STATE_AT_A_TIME // max(1, of_one), _LOGITS_AT_A_TIME // network.num_tokens))
    drawn: list[Tensor] = []
    for first in range(0, size, rows):
        some = slice(first, first + rows)
        features = None if condition is None else condition[some]
        drawn += _continue_rows(network, prompt[some], u[some], choice, features, is_done, cached, stride, num_drawn, told)
    return drawn


def _continue_rows(
    network: NextTokenNetwork,
    prompt: Tensor,
    u: Tensor,
    choice: TokenChoice,
    condition: Tensor | None,
    is_done: Callable[[Tensor], Tensor] | None,
    cached: bool,
    stride: int,
    num_drawn: int,
    told: Callable[[int], None],
) -> list[Tensor]:
    """`continue_tokens` of some rows, each token at its number of u `(B, num_tokens)`."""
    (size, start), num_tokens = prompt.shape, u.shape[1]
    limit = start + num_tokens if network.max_length is None else network.max_length
    tokens = torch.cat([prompt, prompt.new_zeros(size, num_tokens)], 1)
    lengths = torch.full((size,), num_tokens, device=prompt.device)
    place = torch.arange(num_tokens, device=prompt.device)
    state, state_begin = None, -1
    for i in range(num_tokens):
        end = start + i
        begin = -(-max(0, end - limit) // stride) * stride
        goes_on = state is not None and state_begin == begin
        told(size if goes_on else size * (end - begin))
        if goes_on:
            logits, state = network.step(tokens[:, end - 1], state, condition)
        elif not cached:
            logits = network(tokens[:, begin:end], condition)[:, -1]
        else:
            logits, state = network.read(tokens[:, begin:end], network.begin(size), condition)
            state_begin = begin
        tokens[:, end] = draw_tokens(chosen_logits(logits, choice, tokens[:, :end]), u[:, i])
        if is_done is not None:
            ends_here = is_done(tokens[:, start - num_drawn : end + 1]) & (place[i] + 1 < lengths)
            lengths = torch.where(ends_here, i + 1, lengths)
            if bool((lengths <= i + 1).all()):
                break
    return [row[start : start + length] for row, length in zip(tokens, lengths.tolist(), strict=True)]


def chosen_logits(logits: Tensor, choice: TokenChoice, before: Tensor) -> Tensor:
    """The logits `(B, V)` that a token is drawn by, -inf for tokens that the choice leaves out.

    Args:
        logits: `(B, V)` of the next token.
        choice: the settings.
        before: tokens `(B, T)` that count as repeated.
    """
    logits = logits.float()
    if choice.repetition_penalty != 1:
        penalized = torch.where(logits > 0, logits / choice.repetition_penalty, logits * choice.repetition_penalty)
        is_repeated = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, before, True)
        logits = torch.where(is_repeated, penalized, logits)
    if choice.temperature == 0:
        greatest = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).bool()
        return logits.masked_fill(~greatest, -torch.inf)
    if choice.temperature != 1:  # from the greatest one down, so that none overflows however near to 0 it is
        logits = (logits - logits.amax(1, keepdim=True)) / max(choice.temperature, _LEAST_TEMPERATURE)
    if choice.top_k is not None and choice.top_k < logits.shape[1]:
        least = logits.topk(choice.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if choice.top_p is not None:
        ordered, order = logits.softmax(1).sort(dim=1, descending=True, stable=True)
        is_beyond = ordered.cumsum(1) - ordered >= choice.top_p  # those before it are enough
        logits = logits.masked_fill(torch.zeros_like(is_beyond).scatter_(1, order, is_beyond), -torch.inf)
    if choice.min_p is not None:
        least = choice.min_p * logits.softmax(1).amax(1, keepdim=True)
        logits = logits.masked_fill(logits.softmax(1) < least, -torch.inf)
    return logits


def draw_tokens(logits: Tensor, u: Tensor) -> Tensor:
    """One token of each row of logits `(B, V)`, `(B,)` int64: the first whose cumulated probability reaches u `(B,)`."""
    cumulated = logits.double().softmax(1).cumsum(1)
    token = (cumulated < u[:, None]).sum(1)
    return token.clamp(max=logits.shape[1] - 1)
