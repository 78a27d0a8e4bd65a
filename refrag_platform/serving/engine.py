"""Answers questions with one model: retrieval, policy, prompt, generation.

    engine = Engine.load(project, "tiny")
    answer = engine.ask([Message("user", question)], 4)
    print(*answer, sep="")
    answer.sources, answer.usage

It knows nothing of HTTP; `refrag ask QUESTION` uses it as it is. Any number of threads may ask at once: each builds
its own prompt, and their answers are written together, token by token (`decoding.scheduler`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from refrag_platform.agreement import refuse_other_serving
from refrag_platform.decoding.grammar import Grammars
from refrag_platform.decoding.prefix import PrefixCache
from refrag_platform.decoding.prompts import prompt_input
from refrag_platform.decoding.runner import DecoderRunner
from refrag_platform.decoding.scheduler import Load, Scheduler
from refrag_platform.errors import ArtifactError
from refrag_platform.model.families import most_positions
from refrag_platform.model.loading import Bundle, load_bundle
from refrag_platform.model.prompts import stop_ids
from refrag_platform.project import Project
from refrag_platform.recipes import ServingRecipe
from refrag_platform.serving.citations import citation, split_by_kept
from refrag_platform.serving.contract import BadRequest, Message, Sampling, ServedPassage, Sources
from refrag_platform.serving.fitting import at_rate, require_choice, require_room
from refrag_platform.serving.generation import Generation, Refusal, usage_of
from refrag_platform.serving.prompt_builder import PromptBuilder, asked_last
from refrag_platform.serving.selecting import Expand, Selected
from refrag_platform.serving.text import token_texts
from refrag_platform.store.content import StoreDescription
from refrag_platform.store.ranking import texts_to_ask
from refrag_platform.store.retriever import load_retriever
from refrag_platform.store.table import TABLES_FOLDER, ChunkStore, Hit

if TYPE_CHECKING:
    from refrag_platform.decoding.vllm import VllmDecoder
    from refrag_platform.store.collections import Collections


class Engine:
    """One model with its policy, if there is one its chunk store, and the decoder that writes all answers."""

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        store: ChunkStore | None,
        settings: ServingRecipe,
        live: Collections | None = None,
        vllm: Path | None = None,
    ) -> None:
        """live: the store's working copies, where documents may be added. vllm: the decoder's folder, for vLLM to run
        it; the model's own layers are let go of then.
        """
        self.name, self.bundle, self.store, self.settings, self.live = name, bundle, store, settings, live
        model = bundle.model
        self.max_positions = min(settings.max_positions, most_positions(model.decoder) or settings.max_positions)
        refuse_other_serving(model.decoder)
        self._scheduler: Scheduler | VllmDecoder = self._own_decoder() if vllm is None else self._on_vllm(vllm)
        self._stop_ids = stop_ids(model.tokenizer)
        self._prompts = PromptBuilder(name, model.tokenizer, settings, store.retriever if store else None)
        # A tokenizer keeps state while it reads text: answers are put into words by another.
        self._writer = copy.deepcopy(model.tokenizer)
        self._token_text = token_texts(self._writer)
        self._grammars = Grammars(self._writer)
        self._faulty = False

    def _own_decoder(self) -> Scheduler:
        model, settings = self.bundle.model, self.settings
        runner = DecoderRunner(model.decoder, max_positions=self.max_positions, max_batch=settings.slots, dynamic=True)
        runner.warm_up([settings.prefill_positions], [1, settings.slots])
        room = settings.prefix_cache_mb * 2**20
        prefix = PrefixCache(model.encoder_digest(), room, runner.kv_bytes_per_position)
        return Scheduler(runner, prefix, prefill_positions=settings.prefill_positions)

    def _on_vllm(self, folder: Path) -> VllmDecoder:
        from refrag_platform.decoding.vllm import VllmDecoder

        # Of the decoder prompts need the embeddings alone, and vLLM the device's memory.
        self.bundle.model.decoder.get_decoder().layers = nn.ModuleList()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return VllmDecoder(folder, self.bundle.model.dtype, self.max_positions, self.settings.slots)

    @classmethod
    def load(
        cls, project: Project, model: str, live: Path | None = None, tables: str | None = None, vllm: bool = False
    ) -> Engine:
        """The fine-tuned model of a project with its chunk store.

        Args: live, tables, vllm: as of `open`.

        Raises:
            RefragError: an artifact is missing, or the store was made by another encoder.
        """
        recipe = project.recipe(model)
        if not project.content("finetuned", model).is_dir():
            raise ArtifactError(f"{model} has no fine-tuned model yet; make it: `refrag run all --model {model}`")
        return cls.open(
            model,
            project.content("finetuned", model),
            project.content("chunks", model),
            recipe.serving,
            tables=tables,
            base=project.recipe_path(model).parent,
            live=live,
            passage_tokens=recipe.corpus.passage_tokens,
            vllm=vllm,
        )

    @classmethod
    def open(
        cls,
        name: str,
        model_dir: Path,
        chunks_dir: Path,
        settings: ServingRecipe,
        tables: Path | str | None = None,
        base: Path | None = None,
        retriever: str | None = None,
        policy: Path | None = None,
        live: Path | None = None,
        passage_tokens: int = 128,
        vllm: bool = False,
    ) -> Engine:
        """The model and the store in two content folders.

        Args:
            policy: the folder of the model's policy; default: as `load_bundle` finds it.
            tables, base: as of `open_tables`.
            retriever: source of the retriever, if it is no longer where the store says.
            live: folder of the store's working copies, for documents to be added. passage_tokens: the longest passage
                that they are cut into.
            vllm: run the decoder on vLLM.

        Raises:
            RefragError: either is damaged, the store was made by another encoder, or there is no vLLM.
        """
        decoder = model_dir / "decoder" if vllm else None
        bundle = load_bundle(str(model_dir), policy=policy)
        loaded = load_retriever(retriever, base or model_dir) if retriever else None
        if live is not None:
            from refrag_platform.store.collections import COMMON, Collections
            from refrag_platform.store.live import LiveStore

            # One for all of them.
            loaded = loaded or load_retriever(StoreDescription.read(chunks_dir).retriever, base or Path.cwd())
            unchanged = Path(tables or chunks_dir.parent.parent / TABLES_FOLDER)
            collections = Collections(
                live,
                lambda folder, like: LiveStore.open_live(
                    chunks_dir, folder, bundle.model, passage_tokens, base, loaded, unchanged, like
                ),
            )
            return cls(name, bundle, collections.of(COMMON), settings, collections, decoder)
        digest = bundle.model.encoder_digest()
        store = ChunkStore.open(chunks_dir, expect_encoder=digest, tables=tables, base=base, retriever=loaded)
        return cls(name, bundle, store, settings, vllm=decoder)

    def retrieve(self, query: str, count: int, before: str = "", collection: str = "") -> list[ServedPassage]:
        """The `count` passages of the store that fit the query best, best first.

        Args: before: what was said before it. collection: whose working copy of the store is searched.

        Raises:
            BadRequest: this engine has no store.
            QueryTooLong: the query has more words than full-text search takes.
        """
        if count == 0:
            return []
        if self.store is None:
            raise BadRequest(f"{self.name} is served without a chunk store; send `passages`", param="retrieve")
        store = self.store if self.live is None else self.live.of(collection)
        return [_passage(hit) for hit in store.search(query, count, before)]

    def embed(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], int]:
        """The retriever's vectors [n, dim] of texts, and the texts' length in tokens of this model.

        Raises:
            BadRequest: this engine has no store, and so no retriever.
        """
        if self.store is None:
            raise BadRequest(f"{self.name} is served without a chunk store, and so without a retriever", param="model")
        return self.store.retriever.encode(texts), self._prompts.count_tokens(texts)

    @property
    def alive(self) -> bool:
        """Whether it can answer at all; after a fault of the device it can't, and its process must be started anew."""
        return self._scheduler.alive and not self._faulty

    def decoder_load(self) -> Load:
        """What the decoder has to do, and holds."""
        return self._scheduler.load()

    def memory(self) -> str:
        """What keys and values take, for a log."""
        return self._scheduler.memory()

    def close(self) -> None:
        """End the decoder's thread; answers that are being written fail. Let go of the store's working copies."""
        self._scheduler.close()
        if self.live is not None:
            self.live.close()

    def ask(
        self,
        messages: Sequence[Message],
        count: int,
        sent: Sequence[ServedPassage] = (),
        sampling: Sampling | None = None,
        share_kept: float | None = None,
        *,
        rate: int = 1,
        expand: Expand = MappingProxyType({}),
        continues: bool = False,
        collection: str = "",
    ) -> Generation | Refusal:
        """Look passages up and answer over them; refuse where none is near enough to the question.

        Where the nearest passage is nearer to the question together with what the user said before, policy and decoder
        read the two together: of "And of Nepal?" alone, after an answer, a small decoder makes little.

        Args:
            messages: the conversation; the last one is the question, and what the user said before is searched with it.
            count: passages to look up.
            sent: passages to read before them. Who sends some has chosen them, and is answered in any case.
            rate, expand, continues, collection: as of `start`.

        Raises:
            BadRequest, QueryTooLong, SchemaError: as `retrieve` and `start`.
        """
        bundle = at_rate(self.name, self.bundle, rate)
        share = bundle.share_kept if share_kept is None else share_kept
        if count or sent:
            require_choice(self.name, bundle, share)
        question, before = asked_last(messages)
        begun = time.monotonic()
        hits = self.retrieve(question, count, before, collection)
        searched = (begun, time.monotonic())
        nearest = max(hits, key=lambda passage: passage.score or 0.0, default=None)
        similarity = nearest.score if nearest else None
        least = self.settings.least_similarity if count and not sent else None
        if least is not None and (similarity is None or similarity < least):
            # What can't be asked here is an error whatever the store holds.
            self.start(messages, (), sampling, share, continues=continues)
            retrieved = [citation(passage, Selected(self._prompts.chunks(bundle.model, passage))) for passage in hits]
            sources = Sources([], retrieved, False, similarity, least)
            return Refusal(sources, share, rate, searched, sampling.n if sampling else 1)
        if nearest and nearest.follows and not messages[-1].is_result and not continues:
            messages = [*messages[:-1], Message("user", texts_to_ask(question, before)[-1])]
        generation = self.start(
            messages,
            [*sent, *hits],
            sampling,
            share,
            rate=rate,
            expand=expand,
            continues=continues,
            collection=collection,
        )
        generation.sources = replace(generation.sources, similarity=similarity, least_similarity=least)
        if count:
            generation.add_part("retrieve", *searched)
        return generation

    @torch.inference_mode()
    def start(
        self,
        messages: Sequence[Message],
        passages: Sequence[ServedPassage] = (),
        sampling: Sampling | None = None,
        share_kept: float | None = None,
        *,
        rate: int = 1,
        expand: Expand = MappingProxyType({}),
        continues: bool = False,
        collection: str = "",
    ) -> Generation:
        """Build the prompt; the answer is generated as the result is iterated.

        Args:
            messages: the conversation; the last one is the question.
            passages: what to read, in this order.
            share_kept: p, share of chunks kept as tokens; default the recipe's.
            rate: how many chunks are read as one, and are one in all that is said of chunks.
            expand: chunks to keep as tokens beside that share, by the id of their passage.
            continues: whether the decoder goes on with the last message as with any text, instead of answering it.
            collection: whose documents are asked; nothing that a prompt of another one left is used again.

        Raises:
            BadRequest: the prompt is too long, p needs a policy that the model hasn't got, it isn't trained for the
                rate, or there is no such chunk.
            SchemaError: answers can't be held to the schema.
        """
        begun = time.monotonic()
        sampling = sampling or Sampling(self.settings.max_new_tokens)
        bundle = at_rate(self.name, self.bundle, rate)
        share = bundle.share_kept if share_kept is None else share_kept
        if passages:
            require_choice(self.name, bundle, share)
        matcher = self._grammars.matcher(sampling.schema) if sampling.schema else None
        try:
            selected = self._prompts.select(bundle, passages, share, messages[-1].content, expand)
            chosen = time.monotonic()
            prompt = self._prompts.prompt(bundle.model, messages, [one.chunks for one in selected], continues)
            require_room(self.name, prompt, sampling, self.settings, self.max_positions)
            begun_to_project = time.monotonic()
            embeds = prompt_input(bundle.model, prompt)
        except torch.AcceleratorError:
            self._faulty = True
            raise
        pairs = list(zip(passages, selected, strict=True))
        read = [citation(*pair) for pair in pairs]
        generation = Generation(
            lambda: self._scheduler.submit(embeds, sampling, self._stop_ids, collection, matcher),
            self._writer,
            self._token_text,
            sampling,
            split_by_kept(read),
            usage_of(prompt, read, share, rate),
            begun,
            lambda: split_by_kept([self._prompts.cited(bundle.model, *pair) for pair in pairs]),
        )
        generation.add_part("select", begun, chosen)
        generation.add_part("project", begun_to_project, time.monotonic())
        return generation


def _passage(hit: Hit) -> ServedPassage:
    token_ids, vectors = torch.from_numpy(hit.token_ids.astype("int64")), torch.from_numpy(hit.vectors)
    return ServedPassage(hit.id, hit.title, hit.text, hit.score, token_ids, vectors, hit.follows)
