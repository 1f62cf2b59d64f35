"""Adapters that see, through vLLM's own way of taking images."""

import json

import pytest
from bases import IMAGE_PROMPTS, images
from engines import ask, check, running


@pytest.mark.parametrize("encoder, scope", [("clip", "modality"), ("siglip", "gate"), ("clip", "all")])
def test_images_several_of_them_or_none(workshop, encoder, scope):
    folder = workshop.seeing(encoder, scope)
    items = json.loads((folder / "reference.json").read_text())
    inputs = []
    for seed, (text, count) in enumerate(IMAGE_PROMPTS):
        pixels = {"multi_modal_data": {"image": images(count, seed)}} if count else {}
        inputs.append({"prompt": text, **pixels})
    with running(folder, limit_mm_per_prompt={"image": 2}) as engine:
        for _ in range(2):  # the second time from the prefix cache
            check(items, ask(engine, [(one, None) for one in inputs]))
        with pytest.raises(ValueError, match="The prompt has 0 image tokens .<image>., and 1 images were given"):
            ask(engine, [({"prompt": "no place for it", "multi_modal_data": {"image": images(1, 0)}}, None)])
        with pytest.raises(ValueError, match="The prompt has image tokens .id 4096., and no images were given"):
            ask(engine, [({"prompt": "<image>What is this?"}, None)])
