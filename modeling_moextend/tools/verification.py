"""Whether an adapter is whole and does on its base what it promises."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..configuration_moextend import MODALITIES, MoExtendConfig
from ..data.processor_files import readable
from ..loading_moextend import (
    SHARED_HUB_KWARGS,
    auto_class_for,
    by_modality,
    load_base,
    load_stored,
    location_of,
)
from ..modeling_moextend import MoExtendForCausalLM
from ..processing_moextend import MoExtendProcessor
from ..senses_moextend import load_encoder
from ..tensor_files_moextend import shown
from ..tensors_moextend import fingerprint, not_finite, same_fingerprint
from .base_weights import Checkpoint, Unusable, location_of_part, unusable
from .inspection import read_whole

PROMPT = "The"


def verify_adapter(
    name_or_path: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    encoder: str | os.PathLike | None = None,
    prompt: str = PROMPT,
    image: str | os.PathLike | None = None,
    audio: str | os.PathLike | None = None,
    max_new_tokens: int = 20,
    dtype: str | torch.dtype = "auto",
    **hub_kwargs: Any,
) -> dict[str, Any]:
    """Checks an adapter against its base, which is loaded whole; checks that a failed one makes void are left out.

    | check | passes when |
    |---|---|
    | file | it can be read, and its tensors match the checksum in its header |
    | finite | no new tensor holds NaN or infinity |
    | base | the base's fingerprint is the adapter's |
    | fit | names and shapes are what the base and the config ask for; the encoder's fingerprint too |
    | off | logits with the adapter off are the base's, bit for bit |
    | sample | a greedy answer to `prompt`, and to `image` and `audio` before it: all logits of it are finite |

    Args:
        name_or_path: folder or Hub id.
        base, encoder: folder or Hub id, if they lie elsewhere than the adapter says.
        prompt: what the sample begins with; needs a tokenizer with the adapter or the base, else ids 1 to 8 are taken.
        image, audio: files that stand before the prompt; they need a processor with the adapter.
        dtype: what base and encoder are loaded in.

    Returns:
        adapter, ok (every check passed), checks (of each: check, ok, detail), sample (texts with the adapter
        and without it, or token ids; `None`: not reached).

    Raises:
        OSError: adapter, base or encoder can't be found.
        Unusable: a damaged base or encoder, or something that is none; the file is named.
    """
    location, sample = (name_or_path, hub_kwargs), None
    try:
        stored = read_whole(name_or_path, **hub_kwargs)
        config, tensors = MoExtendConfig.from_dict(stored.values), stored.tensors
    except Unusable as error:
        checks = [check_result("file", False, str(error))]
    else:
        auto_class = auto_class_for(config.text_config, AutoModelForCausalLM)
        loaded = load_part("base", base, config, location, load_base, auto_class=auto_class, dtype=dtype).eval()
        loaded.requires_grad_(False)  # as it is when extended: torch may round otherwise where a weight trains
        encoders = []
        requested = by_modality(encoder, list(config.senses))
        for modality in config.senses:
            role = f"{MODALITIES[modality]}encoder"
            encoders.append(load_part(role, requested.get(modality), config, location, load_encoder, dtype=dtype))
        encoder = encoders or None
        tokenizer = find_tokenizer(location, location_of("base", base, config, location))
        given = sensed_inputs(location, list(config.senses), prompt, image=image, audio=audio)
        base_results, sample = base_checks(location, config, loaded, encoder, tokenizer, prompt, max_new_tokens, given)
        checks = file_checks(tensors) + base_results
    ok = all(check["ok"] for check in checks)
    return {"adapter": str(name_or_path), "ok": ok, "checks": checks, "sample": sample}


def load_part(
    role: str,
    requested: str | os.PathLike | None,
    config: MoExtendConfig,
    location: tuple[str | os.PathLike, dict[str, Any]],
    loader: Callable[..., PreTrainedModel],
    **kwargs: Any,
) -> PreTrainedModel:
    """Base or encoder of an adapter; see `load_stored`.

    Raises:
        OSError: not found.
        Unusable: a damaged file, which is named, or something else than it has to be.
    """
    shared = {key: location[1][key] for key in SHARED_HUB_KWARGS if key in location[1]}
    with unusable():
        path, options = location_of_part(role, requested, config, location)
        try:
            return load_stored(role, requested, config, loader, location, **kwargs, **shared)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            with contextlib.suppress(OSError):  # no safetensors: not what is wrong here
                Checkpoint(path, **options)  # names the file, which transformers does not
            raise


def check_result(check: str, ok: bool, detail: str) -> dict[str, Any]:
    return {"check": check, "ok": bool(ok), "detail": detail}


def file_checks(tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The checks that need no base."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    names = not_finite(tensors)
    detail = f"NaN or infinity in {', '.join(map(shown, names))}" if names else "every value of every tensor"
    return [
        check_result("file", True, f"{len(tensors)} tensors, {size:,} bytes"),
        check_result("finite", not names, detail),
    ]


def base_checks(
    location: tuple[str | os.PathLike, dict[str, Any]],
    config: MoExtendConfig,
    base: PreTrainedModel,
    encoder: list[PreTrainedModel] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str,
    max_new_tokens: int,
    given: dict[str, torch.Tensor],
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The checks on `base`, a loaded model, and the sample; `given`: inputs of it beside the prompt."""
    is_same_base, detail = compare_base(config.base_fingerprint, base)
    checks = [check_result("base", is_same_base, f"{base.config._name_or_path}: {detail}")]
    ids = prompt_ids(prompt, tokenizer).to(base.get_input_embeddings().weight.device)
    before, (without, _) = logits_of(base, ids), answer(base, ids, max_new_tokens)
    try:
        model = MoExtendForCausalLM.from_pretrained(
            location[0], base=base, encoder=encoder, check_base=is_same_base, check_trained_on=False, **location[1]
        )
    except ValueError as error:
        return [*checks, check_result("fit", False, str(error))], None
    layers = ", ".join(map(str, config.extended_layers)) or "none"
    dependencies = ", ".join(repr(entry["name"]) for entry in config.trained_on)
    layers += f"; trained on top of {dependencies}, left out here" if dependencies else ""
    with model.disable_adapter():
        bit_equal = torch.equal(logits_of(model, ids), before)
    own = {**given, "input_ids": given.get("input_ids", ids)}
    with_adapter, finite = answer(model, own.pop("input_ids").to(ids.device), max_new_tokens, **own)
    checks += [
        check_result("fit", True, f"extended layers: {layers}"),
        check_result(
            "off",
            bit_equal,
            f"{before.numel():,} logits with the adapter off {'are' if bit_equal else 'are not'} the base's",
        ),
        check_result(
            "sample", finite, f"logits of {len(with_adapter)} new tokens are {'' if finite else 'not all '}finite"
        ),
    ]
    decode = list if tokenizer is None else tokenizer.decode
    shown_prompt = ids[0].tolist() if tokenizer is None else prompt
    return checks, {"prompt": shown_prompt, "base": decode(without), "adapter": decode(with_adapter)}


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
    """Token ids [1, length] that the sample answers.

    Raises:
        ValueError: there are none.
    """
    ids = torch.arange(1, 9)[None] if tokenizer is None else tokenizer(prompt, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise ValueError(f"prompt={prompt!r} makes no tokens: give some text.")
    return ids


def sensed_inputs(
    location: tuple[str | os.PathLike, dict[str, Any]],
    senses: list[str],
    prompt: str,
    **files: str | os.PathLike | None,
) -> dict[str, torch.Tensor]:
    """Inputs of a prompt behind an image or clip (`image`, `audio`: a file), by the adapter's processor; {} without
    any.

    Raises:
        OSError: no processor there.
        ValueError: a file that can't be read; a sense that the adapter does not have.
    """
    files = {modality: file for modality, file in files.items() if file is not None}
    for modality, file in files.items():
        if modality not in senses:
            raise ValueError(f"The adapter has no encoder that takes {modality}: leave out {modality}=...")
        if not os.path.isfile(file):
            raise ValueError(f"{modality}={str(file)!r}: there is no such file.")
    if not files:
        return {}
    names = {"image": "images", "audio": "audio"}
    given = {names[modality]: [[os.fspath(file)]] for modality, file in files.items()}
    processor = MoExtendProcessor.from_pretrained(location[0], **location[1])
    tokens = {"images": processor.image_token, "audio": processor.audio_token}
    text = "".join(tokens[name] or "" for name in given) + prompt
    inputs = dict(processor(**given, text=[text], return_tensors="pt"))
    return {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}


def compare_base(stored: str | None, base: PreTrainedModel) -> tuple[bool, str]:
    """Whether `base` is the one of a fingerprint, and what to say about it."""
    if not stored:
        return False, "the adapter has no base fingerprint, so nothing says that this is its base"
    if same_fingerprint(stored, fingerprint(base.get_decoder())):
        return True, "the adapter's fingerprint"
    return False, "its weights do not match the adapter's base fingerprint"


def find_tokenizer(
    location: tuple[str | os.PathLike, dict[str, Any]], base_location: tuple[str | os.PathLike, dict[str, Any]]
) -> PreTrainedTokenizerBase | None:
    """The adapter's tokenizer, else its base's, or `None`. A location is (folder or Hub id, keywords for the Hub)."""
    for name_or_path, hub_kwargs in (location, base_location):
        path = cached_file(
            name_or_path, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs
        )
        if path is not None:
            with unusable(), readable(f"The tokenizer of {name_or_path}"):
                return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False, **hub_kwargs)
    return None


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


@torch.no_grad()
def answer(
    model: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int, **given: torch.Tensor
) -> tuple[list[int], bool]:
    """A greedy answer: (new token ids, whether all logits on the way were finite)."""
    output = model.generate(
        ids,
        **given,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    finite = all(bool(logits.isfinite().all()) for logits in output.logits)
    return output.sequences[0, ids.shape[1] :].tolist(), finite
