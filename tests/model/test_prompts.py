"""The prompt's frame: how a turn ends, whatever the vocabulary."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from refrag_platform.model.prompts import END, end_of_turn, rag_prompt, stop_ids
from refrag_platform.model.segments import Text


def _tokenizer(special: list[str], eos: str) -> PreTrainedTokenizerFast:
    words = ["[UNK]", eos, *special, "a", "b"]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([eos, *special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token="[UNK]")


def test_a_turn_ends_with_chatml_s_token_where_there_is_one() -> None:
    tokenizer = _tokenizer([END], "</s>")
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(END)


def test_a_vocabulary_without_it_ends_turns_and_answers_with_the_end_of_sequence() -> None:
    tokenizer = _tokenizer([], "</s>")
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id and stop_ids(tokenizer) == {tokenizer.eos_token_id}
    last = rag_prompt(tokenizer, "a", [])[-1]
    assert isinstance(last, Text) and tokenizer.eos_token_id in list(last.token_ids)
