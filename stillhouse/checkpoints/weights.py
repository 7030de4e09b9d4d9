"""Weights on disk: safetensors files, each with a JSON card beside it that says where the weights come from."""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from stillhouse.checkpoints.block_hashes import BlockHashes, hash_range, unchanged
from stillhouse.checkpoints.bounds import parse_json
from stillhouse.files import atomic_write

_PROJECT = ("stillhouse.networks.", "stillhouse.diffusion.")
_TRAINING = ("training", "label_dropout")
PROJECT_ROOT = Path(__file__).resolve().parents[2]


def save_weights(path: str | Path, state_dict: Mapping[str, Tensor], card: dict, replace: bool = False) -> None:
    """Write weights and their card, the same name with .json, both whole or not at all.

    The weights appear last: where they are, their card is.

    Args:
        path: a .safetensors file.
        state_dict: tensors by name, which keep their dtype.
        card: what JSON can say of the weights; the file's "sha256" is added, and of a long file its "blocks".
        replace: whether existing weights may be overwritten.

    Raises:
        ValueError: for another ending or a card that is no JSON.
        FileExistsError: where weights exist already and may not be replaced.
        OSError: where the disk refuses.
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
        with atomic_write(path) as new_weights, atomic_write(card_path) as new_card:  # the card is renamed first
            # Not save_file, which makes files that only their owner can read.
            data = save({name: t.detach().cpu().contiguous() for name, t in state_dict.items()})
            new_weights.write_bytes(data)
            hashes = BlockHashes()
            hashes.update(data)
            blocks = {"blocks": hashes.blocks} if hashes.blocks else {}
            new_card.write_text(json.dumps({**card, "sha256": hashes.whole, **blocks}, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}; free some space there or choose another folder") from error


def load_weights(path: str | Path, module: nn.Module, sha256: str | None = None) -> None:
    """Copy the weights of a file into a module, each cast to the dtype it has there.

    Args:
        path: the file, sought as by `find_weights`.
        module: the network, which is as it was where the file is refused.
        sha256: the file's expected hash, 64 hex digits. Without it a file that has a card is compared with that, a long one
            in some of its blocks.

    Raises:
        FileNotFoundError: for a missing file.
        OSError: for a damaged one or another hash.
        ValueError: where a name or a shape does not fit.
    """
    path = find_weights(path)
    state = read_state(path, sha256)
    check_state(path, state, module)
    module.load_state_dict(state)


def read_state(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read the weights of a file; arguments and errors as of `load_weights`, but that the file is there.

    Returns:
        Tensors by name, on the CPU.
    """
    if sha256 is not None and (actual := hash_file(path)) != sha256.lower():
        raise OSError(f"{path} has SHA-256 {actual}, expected {sha256}; fetch it again or correct teacher.sha256")
    try:
        if sha256 is None and not _matches_its_card(path):
            raise OSError(f"its SHA-256 is not that of {path.with_suffix('.json').name}")
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{path} is damaged, cut short or no safetensors file ({error}); delete it and fetch or train it again"
        ) from error


def _matches_its_card(path: Path) -> bool:
    """Whether the file is the one that its card describes, as far as `unchanged` looks; true where there is no card."""
    try:
        card = read_card(path)
    except OSError:
        return True
    blocks = card.get("blocks", ())
    return isinstance(blocks, list | tuple) and unchanged(path, 0, path.stat().st_size, card["sha256"], blocks)


@contextmanager
def checked_load(file: str | Path, state: Mapping[str, Tensor], module: nn.Module) -> Iterator[None]:
    """Turn the errors of the block, which loads a state dict into a module, into those of `check_state`.

    Names and shapes are compared only after torch refused them, since a module may take others than its state dict's.

    Args:
        file: where the state dict was read, for the message.
        state: tensors by name.
        module: what they are loaded into.

    Raises:
        ValueError: as `check_state`.
    """
    check_numbers(file, state, module)
    try:
        yield
    except RuntimeError:
        check_state(file, state, module)
        raise


def check_numbers(file: str | Path, state: Mapping[str, Tensor], module: nn.Module) -> None:
    """Refuse integers, and numbers of 8 bits, where a module has weights; torch would take both without a word.

    Numbers of 8 bits mean nothing without the scales that belong to them.

    Args:
        file: where the state dict was read, for the message.
        state: tensors by name.
        module: what they are meant for.

    Raises:
        ValueError: in one line, with the names.
    """
    _refuse(file, module, {"of another kind": _no_weights(module.state_dict(), state)})


def check_state(file: str | Path, state: Mapping[str, Tensor], module: nn.Module) -> None:
    """Refuse a state dict whose names or shapes are not those of a module, or whose numbers `check_numbers` refuses.

    Args:
        file: where the state dict was read, for the message.
        state: tensors by name.
        module: what they are meant for.

    Raises:
        ValueError: in one line, with the names.
    """
    expected = module.state_dict()
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & state.keys())
            if state[name].shape != expected[name].shape
        ],
        "of another kind": _no_weights(expected, state),
    }
    _refuse(file, module, problems)


def _no_weights(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} {_kind(state[name])} instead of {_kind(expected[name])}"
        for name in sorted(expected.keys() & state.keys())
        if expected[name].is_floating_point() and not (state[name].is_floating_point() and state[name].itemsize > 1)
    ]


def _refuse(file: str | Path, module: nn.Module, problems: Mapping[str, list[str]]) -> None:
    if any(problems.values()):
        listed = "; ".join(f"{problem}: {_shorten(names)}" for problem, names in problems.items() if names)
        raise ValueError(f"{file} does not fit this {type(module).__name__}: {listed}; check the network's options")


def read_card(path: str | Path) -> dict:
    """Read the card of the weights in the file `path`.

    Raises:
        OSError: naming the card, where it is missing or damaged.
    """
    card = Path(path).with_suffix(".json")
    try:
        content = parse_json(card.read_bytes())
        if not isinstance(content, dict) or "sha256" not in content:
            raise ValueError("it has no sha256")
        return content
    except (OSError, ValueError) as error:
        raise OSError(f"the card {card} is missing or damaged ({error}); delete {path} and make it again") from error


def find_weights(path: str | Path) -> Path:
    """Find a file of weights; a relative path is sought in the current folder, then in the project's.

    Returns:
        The file's absolute path.

    Raises:
        FileNotFoundError: where there is none, with the nearest name that is there and the commands that make some.
    """
    file = find_file(path)
    if file is not None:
        return file
    raise FileNotFoundError(
        f"no weights at {' or '.join(map(str, places(path)))}{did_you_mean(path)}; "
        "train some with `python train.py method=pretrain data=...` (flows: method=rectified_flow), or set teacher.weights"
    )


def find_file(path: str | Path) -> Path | None:
    """Find a file as `find_weights` does, or None."""
    return next((place for place in places(path) if place.is_file()), None)


def places(path: str | Path) -> list[Path]:
    """List the absolute paths at which a file is sought; the first one is where it is written."""
    path = Path(path).expanduser()
    return list(dict.fromkeys([Path.cwd() / path, PROJECT_ROOT / path]))  # both are `path` if it is absolute


def did_you_mean(path: str | Path) -> str:
    """Name, in brackets, the file whose name is most like that of a missing one in the same folder; empty without one."""
    path, near = Path(path), {}
    for folder in {place.parent for place in places(path)}:
        with suppress(OSError):  # there is no such folder, or it can't be read
            near |= {file.stem: file.name for file in folder.iterdir() if file.suffix != ".json" and file.is_file()}
    match = difflib.get_close_matches(path.stem, sorted(near), 1)
    return f" (did you mean {path.with_name(near[match[0]])}?)" if match else ""


def hash_state(state: nn.Module | Mapping[str, Tensor]) -> str:
    """Hash a state dict: SHA-256 over sorted names, shapes and values as little-endian float32.

    Equal for the same weights on any device, in any order and memory format, and in any dtype that holds them. Tensors
    without memory (the meta device's) count by name and shape alone.

    Args:
        state: tensors by name, or a module, whose state dict counts.

    Returns:
        64 hex digits.
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
    """Hash what decides a module's output beside its weights: SHA-256 over classes and settings of this project's layers.

    Weights of one shape serve any number of heads, any filter and any schedule of betas. What only training sees is left out,
    and so are torch's and diffusers' layers, whose attributes change with their versions.

    Returns:
        64 hex digits.
    """
    layers = []
    for name, layer in module.named_modules():
        if type(layer).__module__.startswith(_PROJECT):
            settings = {
                key: value
                for key, value in vars(layer).items()
                if not key.startswith("_") and key not in _TRAINING and _is_plain(value)
            }
            layers.append([name, type(layer).__name__, settings])
    return hashlib.sha256(json.dumps(layers, sort_keys=True).encode()).hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def hash_file(path: Path) -> str:
    """Hash a file: SHA-256, 64 hex digits."""
    return hash_range(path, 0, path.stat().st_size)


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shorten(names: list[str], shown: int = 5) -> str:
    rest = len(names) - shown
    first = (name if name.isprintable() and len(name) < 200 else ascii(name[:200])[1:-1] for name in names[:shown])
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")
