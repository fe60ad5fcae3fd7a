"""Text from decoders by greedy decoding, beam search and sampling, given ``(params, ids, mask, cache)``."""

from dp_rmt.generation.generate import generate
from dp_rmt.generation.methods import Beam, Generated, Greedy, Method, Sampling
from dp_rmt.generation.texts import generate_texts

__all__ = ["Beam", "Generated", "Greedy", "Method", "Sampling", "generate", "generate_texts"]
