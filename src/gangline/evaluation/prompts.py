"""Token ids to test with: a text where the model has a tokenizer, else ids drawn at random."""

from typing import Any

import torch
from torch import Tensor

# Our own sentences: long enough for a few hundred tokens, with names, numbers, code and a list.
TEXT = """The harbour town wakes before the sun. Fishermen carry wet nets over the stones, gulls quarrel on
the roofs, and the baker counts seventeen loaves into a basket for the school. By nine o'clock the
ferry from the northern islands has brought two letters, a crate of oranges and a mechanic called
Ines, who says that the old crane can be repaired if someone finds her a gear with forty teeth.
Nobody can, so she draws one on the back of an envelope and asks the smith how long he would need.
"Three days," he says, "or two, if it rains."

How would you describe a good tool? It does one thing, it says what it is doing, and when it fails it leaves
everything as it was. A short program can be such a tool:

def total(prices, discount=0.1):
    return sum(price * (1 - discount) for price in prices)

Water boils at 100 degrees Celsius at sea level, and at about 93 degrees on a mountain of 2,000 metres,
because the air presses less on its surface. To make tea there: first warm the pot; second, use a little
more tea; third, wait longer than you think. The capital of France is Paris, the capital of Japan is Tokyo,
and the capital of Australia, which many people get wrong, is Canberra. In the evening the gear was ready,
the crane lifted its first load, and Ines took the last ferry home with a bag of bread that she had not paid
for."""


def prompt_ids(tokenizer: Any | None, vocabulary: int, rows: int, length: int, seed: int) -> Tensor:
    """Return ``rows`` prompts of ``length`` tokens each, all different.

    With a tokenizer the prompts are windows of :data:`TEXT`, begun at places drawn with ``seed``; without one
    the ids are uniform over the vocabulary.

    Returns:
        int64 tensor (rows, length).
    """
    generator = torch.Generator().manual_seed(seed)
    if tokenizer is None:
        return torch.randint(0, vocabulary, (rows, length), generator=generator)
    text = torch.tensor(tokenizer(TEXT, add_special_tokens=False)["input_ids"], dtype=torch.long)
    if len(text) < length + rows:
        text = text.repeat(-(-(length + rows) // len(text)))
    starts = torch.randperm(len(text) - length + 1, generator=generator)[:rows]
    return torch.stack([text[start : start + length] for start in starts.tolist()])
