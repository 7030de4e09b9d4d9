"""Weights on disk: safetensors files, each with a JSON card beside it that says where the weights come from."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from stillhouse.checkpoints.block_hashes import BlockHashes, hash_range, unchanged
from stillhouse.checkpoints.bounds import parse_json
from stillhouse.files import unfinished

_OURS = ("stillhouse.networks.", "stillhouse.diffusion.")
_TRAINING = ("training", "label_dropout")
PROJECT_ROOT = Path(__file__).resolve().parents[2]


def save_weights(path: str | Path, state_dict: Mapping[str, Tensor], card: dict, replace: bool = False) -> None:
    """Write `path` (.safetensors) and its card, the same name with .json, to which the file's "sha256" is added.

    Tensors keep their dtype. Both files appear whole or not at all, the weights last: where they are, their card is.
    Raises FileExistsError where weights exist already and may not be replaced, OSError where the disk refuses.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"weights are saved as .safetensors, got {path}")
    try:
        json.dumps(card, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the card of {path} cannot be written as JSON: {error}") from error
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already; move it away or choose another name")
    card_path = path.with_suffix(".json")
    try:
        with unfinished(path) as new_weights, unfinished(card_path) as new_card:
            # Not save_file, which makes files that only their owner can read.
            data = save({name: t.detach().cpu().contiguous() for name, t in state_dict.items()})
            new_weights.write_bytes(data)
            hashes = BlockHashes()
            hashes.update(data)
            blocks = {"blocks": hashes.blocks} if hashes.blocks else {}
            new_card.write_text(json.dumps({**card, "sha256": hashes.whole, **blocks}, indent=2) + "\n")
            os.replace(new_card, card_path)
            os.replace(new_weights, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}; free some space there or choose another folder") from error


def load_weights(path: str | Path, module: nn.Module, sha256: str | None = None) -> None:
    """Copy the weights of the file `path` (see `find_weights`) into `module`, each cast to the dtype it has there.

    Every name and shape must fit, else ValueError; `module` is then as it was. `sha256`: the file's expected hash. Without it
    a file that has a card is compared with that, a long one in some of its blocks.
    Raises FileNotFoundError for a missing file and OSError for a damaged one or another hash.
    """
    path = find_weights(path)
    if sha256 is not None and (found := hash_file(path)) != sha256.lower():
        raise OSError(f"{path} has SHA-256 {found}, expected {sha256}; fetch it again or correct teacher.sha256")
    try:
        if sha256 is None and not _is_of_its_card(path):
            raise OSError(f"its SHA-256 is not that of {path.with_suffix('.json').name}")
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{path} is damaged, cut short or no safetensors file ({error}); delete it and fetch or train it again"
        ) from error
    check_state(path, state, module)
    module.load_state_dict(state)


def _is_of_its_card(path: Path) -> bool:
    """Whether the file is the one that its card describes, as far as `unchanged` looks; true where there is no card."""
    try:
        card = read_card(path)
    except OSError:
        return True
    blocks = card.get("blocks", ())
    return isinstance(blocks, list | tuple) and unchanged(path, 0, path.stat().st_size, card["sha256"], blocks)


@contextmanager
def checked_load(file: str | Path, state: Mapping[str, Tensor], module: nn.Module) -> Iterator[None]:
    """Around the block that loads `state`, read from `file`, into the module: its errors are those of `check_state`.

    Names and shapes are looked at only after torch refused them, since a module may take others than its own.
    """
    check_numbers(file, state, module)
    try:
        yield
    except RuntimeError:
        check_state(file, state, module)
        raise


def check_numbers(file: str | Path, state: Mapping[str, Tensor], module: nn.Module) -> None:
    """Errors: ValueError, one line, for integers in `state`, read from `file`, where the module has weights.

    Numbers of 8 bits mean nothing without the scales that belong to them; torch would take both without a word.
    """
    own = module.state_dict()
    _report(file, module, {"of another kind": _not_numbers(own, state)})


def check_state(file: str | Path, state: Mapping[str, Tensor], module: nn.Module) -> None:
    """Errors: ValueError, one line, where a name or shape in `state`, read from `file`, is not that of the module.

    And as `check_numbers`.
    """
    own = module.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in sorted(own.keys() & state.keys())
            if state[name].shape != own[name].shape
        ],
        "of another kind": _not_numbers(own, state),
    }
    _report(file, module, problems)


def _not_numbers(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} {_kind(state[name])} instead of {_kind(own[name])}"
        for name in sorted(own.keys() & state.keys())
        if own[name].is_floating_point() and not (state[name].is_floating_point() and state[name].itemsize > 1)
    ]


def _report(file: str | Path, module: nn.Module, problems: Mapping[str, list[str]]) -> None:
    if any(problems.values()):
        found = "; ".join(f"{problem}: {_shorten(names)}" for problem, names in problems.items() if names)
        raise ValueError(f"{file} does not fit this {type(module).__name__}: {found}; check the network's options")


def read_card(path: str | Path) -> dict:
    """The card of the weights in the file `path`; OSError, naming the card, where it is missing or damaged."""
    card = Path(path).with_suffix(".json")
    try:
        content = parse_json(card.read_bytes())
        if not isinstance(content, dict) or "sha256" not in content:
            raise ValueError("it has no sha256")
        return content
    except (OSError, ValueError) as error:
        raise OSError(f"the card {card} is missing or damaged ({error}); delete {path} and make it again") from error


def find_weights(path: str | Path) -> Path:
    """The absolute path of an existing file; a relative one is sought in the current folder, then in the project's."""
    found = find_file(path)
    if found is not None:
        return found
    raise FileNotFoundError(
        f"no weights at {' or '.join(map(str, places(path)))}; "
        "train some with `python train.py method=pretrain data=...` (flows: method=rectified_flow), or set teacher.weights"
    )


def find_file(path: str | Path) -> Path | None:
    """As `find_weights`, but None where there is none."""
    return next((place for place in places(path) if place.is_file()), None)


def places(path: str | Path) -> list[Path]:
    """Where a file is sought; the first one is where it is written."""
    path = Path(path).expanduser()
    return list(dict.fromkeys([Path.cwd() / path, PROJECT_ROOT / path]))  # both are `path` if it is absolute


def hash_state(state: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 (64 hex digits) over sorted names, shapes and values as little-endian float32.

    The same for the same weights on any device, in any order and memory format, and in any dtype that holds them. Tensors
    without memory (the meta device's) count by name and shape alone.
    """
    if isinstance(state, nn.Module):
        state = state.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        if state[name].is_meta:
            continue
        value = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(value.numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def hash_form(module: nn.Module) -> str:
    """SHA-256 (64 hex digits) over classes and settings of the module's own parts: what decides its output beside weights.

    Weights of one shape serve any number of heads, any filter and any schedule of betas. What only training sees is left out,
    and so are torch's and diffusers' layers, whose attributes change with their versions.
    """
    parts = []
    for name, part in module.named_modules():
        if type(part).__module__.startswith(_OURS):
            found = {
                key: value for key, value in vars(part).items() if not key.startswith("_") and key not in _TRAINING
            }
            parts.append([name, type(part).__name__, {key: value for key, value in found.items() if _is_plain(value)}])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    return hash_range(path, 0, path.stat().st_size)


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shorten(names: list[str], shown: int = 5) -> str:
    rest = len(names) - shown
    first = (name if name.isprintable() and len(name) < 200 else ascii(name[:200])[1:-1] for name in names[:shown])
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")
