"""Whether a request fits the model that it is sent to."""

from __future__ import annotations

from dataclasses import replace

from refrag_platform.errors import RefragError
from refrag_platform.model.loading import Bundle
from refrag_platform.model.segments import Prompt, prompt_length
from refrag_platform.recipes import ServingRecipe
from refrag_platform.serving.contract import BadRequest, Sampling


def at_rate(name: str, bundle: Bundle, rate: int) -> Bundle:
    """The model as it reads so many chunks as one, with its policy.

    Raises:
        BadRequest: it is not trained for that.
    """
    try:
        return replace(bundle, model=bundle.model.at_rate(rate))
    except RefragError as error:
        raise BadRequest(f"{name}: {error}", param="refrag.rate") from None


def require_choice(name: str, bundle: Bundle, share: float) -> None:
    """There is a policy, where there is something to choose.

    Raises:
        BadRequest: there isn't.
    """
    if bundle.policy is None and share not in (0, 1):
        raise BadRequest(
            f"share_kept is {share}, but {name} has no policy to choose with; use 0 or 1", param="share_kept"
        )


def require_positions(name: str, prompt: Prompt, settings: ServingRecipe, what: str) -> int:
    """The prompt's positions, which are no more than the recipe allows.

    Args: what: takes them, for the message.

    Raises:
        BadRequest: they are more.
    """
    positions, limit = prompt_length(prompt), settings.max_prompt_positions
    if positions > limit:
        raise BadRequest(
            f"{what} {positions} decoder positions, the limit of {name} is {limit}; "
            "send fewer or shorter passages or messages, or a lower share_kept",
            code="context_length_exceeded",
            param="messages",
        )
    return positions


def require_room(name: str, prompt: Prompt, sampling: Sampling, settings: ServingRecipe, most: int) -> None:
    """There is room for the prompt and the answer's choices.

    Args: most: positions of a slot.

    Raises:
        BadRequest: there isn't.
    """
    positions = require_positions(name, prompt, settings, "the prompt takes")
    if positions + sampling.max_tokens > most:
        raise BadRequest(
            f"the prompt takes {positions} decoder positions and max_tokens asks for {sampling.max_tokens} more, "
            f"{name} holds {most} in all; lower max_tokens or shorten the prompt",
            code="context_length_exceeded",
            param="max_tokens",
        )
    if sampling.n > settings.slots:
        raise BadRequest(f"n is {sampling.n}; {name} writes at most {settings.slots} choices at once", param="n")
