"""Maps of where the U-Net looks at a concept, against sums written out pixel by pixel."""

import pytest
import torch

from erasure.attention import concept_columns, concept_maps, recorded_attention
from erasure.concept import Concept
from tests.oracles import attention as oracle
from tests.oracles import fmn

CONCEPT = Concept("c", "object", targets=("a church", "a fish in the snow"), templates=("a photo of {}",))


@torch.no_grad()
def test_maps_are_the_mean_over_layers_heads_and_tokens_stretched_to_0_and_1(tiny_model64):
    prompts = CONCEPT.target_prompts
    text = tiny_model64.encode(prompts)
    latents = tiny_model64.initial_latents([0, 1])
    columns = concept_columns(tiny_model64, CONCEPT)

    with recorded_attention(tiny_model64) as record:
        tiny_model64.predict(latents, 300, text)
    maps = {size: concept_maps(record, columns, size) for size in ((8, 8), (4, 4))}

    for place in range(2):
        tokens = columns[place].nonzero().flatten().tolist()
        seen = fmn.seen_by_layers(tiny_model64.network, latents[place], 300, text[place])
        layers = [fmn.probabilities(layer, pixels, text[place]) for layer, pixels in seen]
        for size, found in maps.items():
            counted = [heads for heads in layers if len(heads[0]) == size[0] * size[1]]
            expected = torch.tensor(oracle.stretched_map(counted, tokens, size), dtype=torch.float64)
            torch.testing.assert_close(found[place], expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_attention_that_is_the_same_everywhere_gives_zeros(tiny_model):
    columns = concept_columns(tiny_model, CONCEPT)[:1]
    for name, weight in tiny_model.network.named_parameters():
        if name.endswith("attn2.to_k.weight"):
            weight.zero_()

    with recorded_attention(tiny_model) as record:
        tiny_model.predict(tiny_model.initial_latents([0]), 300, tiny_model.encode(["a church"]))

    assert torch.equal(concept_maps(record, columns, (8, 8)), torch.zeros(1, 8, 8))


def test_a_size_that_no_layer_has_is_refused(tiny_model):
    columns = concept_columns(tiny_model, CONCEPT)[:1]
    with recorded_attention(tiny_model) as record:
        tiny_model.predict(tiny_model.initial_latents([0]), 300, tiny_model.encode(["a church"]))

    with pytest.raises(ValueError, match=r"No cross-attention layer looks with 16x16 pixels; .* pixels are 64, 16\."):
        concept_maps(record, columns, (16, 16))
